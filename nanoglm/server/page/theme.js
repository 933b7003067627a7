// A chosen theme is set before anything is drawn, so that the page does not flash in the other one.
try {
  document.documentElement.dataset.theme = localStorage.getItem("nanoglm.theme") ?? "";
} catch {
  // Storage is refused: the system's theme it is.
}
