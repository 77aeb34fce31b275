"""What a recipe can say about the audit: thresholds, and findings to ignore."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from tutelage.audit.findings import CATALOGUE
from tutelage.errors import did_you_mean
from tutelage.spec import Many, Share, Spec


def _known(name: str) -> str:
    if name not in CATALOGUE:
        raise ValueError(f"{name!r} is no finding; {did_you_mean(name, CATALOGUE)}")
    return name


FindingName = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(CATALOGUE)})]


class AuditSpec(Spec):
    """The audit of the whole planned set before training. Shares are of one source; above them a finding stops the run."""

    enabled: bool = True
    """Audit before training."""
    ignore: Many[FindingName] = ()
    """Findings that neither stop the run nor are shown."""
    max_zero_weight_share: Share = 0.0
    """Examples in which no token has a loss weight."""
    max_no_stop_share: Share = 0.0
    """Examples with a learned turn that has no stop."""
    max_cut_answer_share: Share = 0.0
    """Examples that end inside a learned turn."""
    max_forged_share: Share = 0.0
    """Examples in which a message holds a real special token."""
    max_render_loss_share: Share = 0.2
    """Records that rendering refused, overlong ones aside; a source that loses every record always stops the run."""
    max_duplicate_share: Share = 1.0
    """Records that repeat an earlier one."""
    max_unfinished_share: Share = 1.0
    """Records with an answer that breaks off in mid-sentence."""
    min_supervised_share: Share = 0.01
    """A source with a smaller share of learned tokens is warned about."""
    mixed_system_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02
    """A source with a share of system turns between this and one minus this is warned about."""
    num_shown: int = Field(default=5, ge=1, le=20)
    """Record ids named per finding and source; findings.parquet has all."""
