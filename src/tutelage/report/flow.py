"""Where the records went, drawn as ribbons from sources to fates: plain SVG text. Pure.

Thickness is the number of records; a fate too small to see still gets a hairline and its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tutelage.report.data import HELD_OUT, NOT_DRAWN, NOT_SAMPLED, PLANNED, SourceFlow
from tutelage.report.look import visible
from tutelage.report.tables import fate_order, plural, spoken, write

COLOURS = {PLANNED: "#1f5f8b", HELD_OUT: "#a8541a", NOT_DRAWN: "#7b848d", NOT_SAMPLED: "#7b848d"}
DROP_COLOUR = "#a6322b"
OTHER = "other reasons"

_BODY_PX = 230.0  # height of all records together
_LINE_PX = 17.0  # room for one label
_GAP_PX = 7.0
_BAR_PX = 7.0
_HEAD_PX = 20.0
_MOST_DROPS = 8
_LETTER_PX = 7.2  # a generous mean width at 12 px


@dataclass(frozen=True, slots=True)
class _Node:
    """A bar: its centre line is the middle of its label."""

    name: str
    num: int
    top: float
    height: float

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


def flow_svg(flows: Sequence[SourceFlow], *, width_px: int) -> str:
    """The picture as one `<svg>` element of the given width, its height following the number of fates."""
    flows, fates = _grouped([flow for flow in flows if flow.num_read])
    num_read = sum(flow.num_read for flow in flows)
    if not num_read:
        return ""
    scale = _BODY_PX / num_read
    left = _stack([(flow.source, flow.num_read) for flow in flows], scale)
    right = _stack([(fate, sum(flow.fates.get(fate, 0) for flow in flows)) for fate in fates], scale)
    left, right, height = _centred(left, right)
    x_left, x_right = _bars_x(left, right, width_px)
    parts = [
        _heads(x_left, x_right),
        _ribbons(flows, left, right, scale=scale, x_from=x_left + _BAR_PX, x_to=x_right),
        *(_bar(node, x_left, "#5c6670") + _label(node, x_left - 7, "end", width_px) for node in left),
        *(_bar(node, x_right, _colour(node.name)) + _label(node, x_right + _BAR_PX + 7, "start", width_px) for node in right),
    ]
    label = escape(_described(flows, fates), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width_px} {height:.0f}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _grouped(flows: Sequence[SourceFlow]) -> tuple[list[SourceFlow], list[str]]:
    """The flows with rare reasons joined into one, so that the picture stays legible; the table lists them all."""
    order = fate_order(flows)
    drops = [fate for fate in order if fate not in COLOURS]
    rare = set(drops[_MOST_DROPS - 1 :]) if len(drops) > _MOST_DROPS else set()
    if not rare:
        return list(flows), order
    return [SourceFlow(f.source, f.num_read, _joined(f.fates, rare)) for f in flows], [
        *(f for f in order if f not in rare),
        OTHER,
    ]


def _joined(fates: Mapping[str, int], rare: set[str]) -> dict[str, int]:
    out = {fate: num for fate, num in fates.items() if fate not in rare}
    return out | {OTHER: sum(num for fate, num in fates.items() if fate in rare)}


def _stack(items: Sequence[tuple[str, int]], scale: float) -> list[_Node]:
    nodes, y = [], _HEAD_PX
    for name, num in items:
        height = max(num * scale, 1.0)
        slot = max(height, _LINE_PX)
        nodes.append(_Node(name, num, y + (slot - height) / 2, height))
        y += slot + _GAP_PX
    return nodes


def _centred(left: list[_Node], right: list[_Node]) -> tuple[list[_Node], list[_Node], float]:
    """Both columns with the shorter one moved down to the middle, and the height of the picture."""
    ends = [max(column[-1].top + column[-1].height, column[-1].middle + _LINE_PX / 2) for column in (left, right)]
    total = max(ends)
    moved = [
        [_Node(n.name, n.num, n.top + (total - end) / 2, n.height) for n in column]
        for column, end in zip((left, right), ends, strict=True)
    ]
    return moved[0], moved[1], total + 6


def _bars_x(left: Sequence[_Node], right: Sequence[_Node], width_px: int) -> tuple[float, float]:
    """Where the two columns of bars stand: labels get what they need, up to a third of the width each."""
    room = [min(max(len(_text(n, width_px)) for n in column) * _LETTER_PX + 10, width_px * 0.36) for column in (left, right)]
    return room[0], width_px - room[1] - _BAR_PX


def _ribbons(
    flows: Sequence[SourceFlow], left: Sequence[_Node], right: Sequence[_Node], *, scale: float, x_from: float, x_to: float
) -> str:
    used_right = {node.name: node.top for node in right}
    parts = []
    for flow, node in zip(flows, left, strict=True):
        y = node.top
        for target in right:
            if num := flow.fates.get(target.name, 0):
                thickness = num * scale
                parts.append(_ribbon(y, used_right[target.name], max(thickness, 0.6), x_from, x_to, colour=_colour(target.name)))
                parts.append(f"<title>{escape(_safe(f'{flow.source}: {spoken(target.name)} {num:,}'))}</title></path>")
                y += thickness
                used_right[target.name] += thickness
    return f'<g fill-opacity="0.32">{"".join(parts)}</g>'


def _ribbon(y0: float, y1: float, thickness: float, x0: float, x1: float, *, colour: str) -> str:
    bend = (x0 + x1) / 2
    path = (
        f"M{x0:.1f},{y0:.1f}C{bend:.1f},{y0:.1f} {bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"
        f"v{thickness:.1f}C{bend:.1f},{y1 + thickness:.1f} {bend:.1f},{y0 + thickness:.1f} {x0:.1f},{y0 + thickness:.1f}Z"
    )
    return f'<path d="{path}" fill="{colour}">'


def _bar(node: _Node, x: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{node.top:.1f}" width="{_BAR_PX:.0f}" height="{node.height:.1f}" fill="{colour}"/>'


def _label(node: _Node, x: float, anchor: str, width_px: int) -> str:
    text = escape(_text(node, width_px))
    return f'<text x="{x:.1f}" y="{node.middle + 4:.1f}" text-anchor="{anchor}" font-size="12" fill="#1b1f24">{text}</text>'


def _heads(x_left: float, x_right: float) -> str:
    style = 'y="11" font-size="11" fill="#5c6670"'
    return (
        f'<text x="{x_left + _BAR_PX:.1f}" text-anchor="end" {style}>read from</text>'
        f'<text x="{x_right:.1f}" text-anchor="start" {style}>what became of it</text>'
    )


def _text(node: _Node, width_px: int) -> str:
    """The label: name and number, the name cut where the picture has no room."""
    most = int(width_px * 0.36 / _LETTER_PX) - len(write(node.num, "count")) - 2
    name = _safe(spoken(node.name))
    return f"{name if len(name) <= most else name[: most - 1] + '…'} {write(node.num, 'count')}"


def _safe(text: str) -> str:
    return visible(text).replace("\n", " ").replace("\t", " ")


def _colour(fate: str) -> str:
    return COLOURS.get(fate, DROP_COLOUR)


def _described(flows: Sequence[SourceFlow], fates: Sequence[str]) -> str:
    """The picture in words, for those who cannot see it."""
    named = ", ".join(f"{spoken(fate)} {sum(flow.fates.get(fate, 0) for flow in flows):,}" for fate in fates)
    num_read = sum(flow.num_read for flow in flows)
    return _safe(
        f"Flow of {plural(num_read, 'record')} from {plural(len(flows), 'source')}: {named}. The table below has the numbers."
    )
