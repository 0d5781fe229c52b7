// plots: the nearest point under the pointer, or the next one by arrow keys, is shown with its values
for (const plot of document.querySelectorAll(".plot[data-points]")) {
  const lines = JSON.parse(plot.dataset.points), svg = plot.querySelector("svg");
  const points = lines.flatMap(([name, own]) => own.map(([x, y, text]) => ({ x, y, text: `${name} · ${text}` })));
  if (!points.length) continue;
  const tip = document.createElement("div"), dot = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  dot.className = "dot";
  dot.hidden = true;
  plot.append(tip, dot);
  let place = -1;
  const show = (index) => {
    const point = points[index], unit = svg.clientWidth / svg.viewBox.baseVal.width || svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    place = index;
    dot.hidden = false;
    tip.textContent = point.text;
    dot.style.left = `${point.x * unit}px`;
    dot.style.top = tip.style.top = `${point.y * unit}px`;
    const half = tip.offsetWidth / 2, left = plot.scrollLeft;
    tip.style.left = `${Math.min(Math.max(point.x * unit, left + half), Math.max(left + plot.clientWidth - half, left + half))}px`;
    tip.style.transform = point.y * unit < 40 ? "translate(-50%, 40%)" : "";
  };
  const hide = () => { tip.textContent = ""; dot.hidden = true; };
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), unit = box.width / svg.viewBox.baseVal.width;
    const far = (point) => Math.hypot(point.x * unit - event.clientX + box.left, point.y * unit - event.clientY + box.top);
    show(points.reduce((best, point, index) => (far(point) < far(points[best]) ? index : best), 0));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show((place + step + points.length) % points.length);
  });
}
// links into folded details open them
const unfold = () => {
  for (let place = document.getElementById(decodeURIComponent(location.hash.slice(1))); place; place = place.parentElement) if (place.tagName === "DETAILS") place.open = true;
};
addEventListener("hashchange", unfold);
unfold();
