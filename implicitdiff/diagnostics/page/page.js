"use strict";
(() => {
  const svg = document.getElementById("network");
  if (!svg) return;
  const whole = { x: 0, y: 0, w: Number(svg.dataset.width), h: Number(svg.dataset.height) };
  let view = { ...whole };
  const show = () => svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
  const zoom = (factor, at) => {
    const w = Math.min(whole.w * 1.5, Math.max(120, view.w * factor));
    const h = view.h * (w / view.w);
    const px = at ? at.x : view.x + view.w / 2;
    const py = at ? at.y : view.y + view.h / 2;
    view = { x: px - (px - view.x) * (w / view.w), y: py - (py - view.y) * (h / view.h), w, h };
    show();
  };
  const point = (event) => {
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return { x: p.x, y: p.y };
  };
  // The wheel scrolls the page; with Ctrl, or by pinching, it zooms.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, point(event));
  }, { passive: false });
  const fingers = new Map();
  let spread = 0;
  svg.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    svg.classList.add("held");
  });
  svg.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      const [a, b] = [...fingers.values()];
      const now = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
      if (spread) zoom(spread / now);
      spread = now;
      return;
    }
    const scale = 1 / svg.getScreenCTM().a;
    view.x -= (event.clientX - before.clientX) * scale;
    view.y -= (event.clientY - before.clientY) * scale;
    show();
  });
  for (const end of ["pointerup", "pointercancel", "pointerleave"]) {
    svg.addEventListener(end, (event) => {
      fingers.delete(event.pointerId);
      spread = 0;
      if (!fingers.size) svg.classList.remove("held");
    });
  }
  document.getElementById("closer").addEventListener("click", () => zoom(1 / 1.4));
  document.getElementById("farther").addEventListener("click", () => zoom(1.4));
  document.getElementById("all").addEventListener("click", () => { view = { ...whole }; show(); });

  const facts = document.getElementById("facts");
  const choose = (node) => {
    for (const other of svg.querySelectorAll(".node.chosen")) other.classList.remove("chosen");
    node.classList.add("chosen");
    const key = node.id.slice("node-".length);
    for (const edge of svg.querySelectorAll(".edge")) {
      edge.classList.toggle("lit", edge.dataset.from === key || edge.dataset.to === key);
    }
    facts.textContent = "";
    const add = (tag, text) => {
      const line = document.createElement("div");
      const inner = document.createElement(tag);
      inner.textContent = text;
      line.append(inner);
      facts.append(line);
    };
    add("b", `${node.dataset.title}${node.dataset.axes ? ` (${node.dataset.axes})` : ""}`);
    if (node.dataset.formula) add("code", node.dataset.formula);
    if (node.dataset.structure) add("span", node.dataset.structure);
  };
  for (const node of svg.querySelectorAll(".node")) {
    node.addEventListener("click", () => choose(node));
    node.addEventListener("focus", () => choose(node));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(node); }
    });
  }
})();
