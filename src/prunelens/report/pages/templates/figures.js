// Draws the figures with the theme's colours, one after the other, those of the chosen model first.
"use strict";
const Figures = (() => {
  const theme = JSON.parse(document.getElementById("theme").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displayModeBar: false, // it would cover the legends; drag to zoom, double-click to reset
  };
  const plots = [...document.querySelectorAll(".plot")].map((node) => ({
    node,
    text: node.nextElementSibling.textContent,
    drawn: false,
  }));
  let waiting = 0;

  function coloured(value, colours) {
    if (typeof value === "string") return Object.hasOwn(colours, value) ? colours[value] : value;
    if (Array.isArray(value)) return value.map((item) => coloured(item, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, colours)]));
  }

  function draw(plot) {
    const style = getComputedStyle(document.documentElement);
    const colours = Object.fromEntries(
      Object.entries(theme).map(([sentinel, name]) => [sentinel, style.getPropertyValue(name).trim()]),
    );
    const spec = coloured(JSON.parse(plot.text), colours);
    if (touch) spec.layout.dragmode = false;
    plot.drawn = true;
    return Plotly.react(plot.node, spec.data, spec.layout, config);
  }

  // Draws what can be seen and is not drawn yet, leaving the page free in between.
  function show() {
    clearTimeout(waiting);
    const next = plots.find((plot) => !plot.drawn && plot.node.offsetParent !== null);
    document.documentElement.dataset.figures = next ? "drawing" : "drawn";
    if (!next) return;
    draw(next);
    waiting = setTimeout(show, 0);
  }

  function again() {
    for (const plot of plots) plot.drawn = false;
    show();
  }

  dark.addEventListener("change", again);
  return { show };
})();
