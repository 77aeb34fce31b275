"use strict";
// The page is complete without this: it only saves clicks. One button per section folds and unfolds its details.
for (const section of document.querySelectorAll("section")) {
  const folds = section.querySelectorAll(":scope > details");
  if (folds.length < 2) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "fold-all";
  const isAllOpen = () => Array.from(folds).every((fold) => fold.open);
  const relabel = () => { button.textContent = isAllOpen() ? "Close all" : "Open all"; };
  button.addEventListener("click", () => {
    const open = !isAllOpen();
    for (const fold of folds) fold.open = open;
    relabel();
  });
  for (const fold of folds) fold.addEventListener("toggle", relabel);
  relabel();
  folds[0].before(button);
}
