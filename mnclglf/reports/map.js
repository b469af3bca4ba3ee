"use strict";
(() => {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const map = document.getElementById("map"), tip = map.querySelector(".tip");
  const picture = tip.querySelector("i"), text = tip.querySelector("span"), scale = 2;
  let shown = -1;
  picture.style.width = picture.style.height = data.side * scale + "px";
  picture.style.backgroundImage = `url(${data.sheet})`;
  picture.style.backgroundSize = data.columns * data.side * scale + "px auto";
  const show = (index) => {
    shown = index;
    tip.hidden = index < 0;
    if (index < 0) return;
    const [x, y, label] = data.points[index], box = map.querySelector("svg").getBoundingClientRect();
    picture.style.backgroundPosition =
      `${-(index % data.columns) * data.side * scale}px ${-Math.floor(index / data.columns) * data.side * scale}px`;
    text.textContent = label < 0 ? "" : data.labels[label];
    const half = tip.offsetWidth / 2, left = ((2 + 100 * x) / 104) * box.width;
    tip.style.left = Math.min(Math.max(left, half), box.width - half) + "px";
    tip.style.top = ((2 + 100 * y) / 104) * box.height + "px";
  };
  map.addEventListener("pointermove", (event) => {
    const box = map.querySelector("svg").getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 1.04 - 0.02;
    const y = ((event.clientY - box.top) / box.height) * 1.04 - 0.02;
    let best = -1, least = 0.03 ** 2;
    data.points.forEach(([px, py], index) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [index, distance];
    });
    show(best);
  });
  map.addEventListener("pointerleave", () => show(-1));
  map.addEventListener("blur", () => show(-1));
  map.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key === "Escape") show(-1);
    if (!(event.key in moves)) return;
    event.preventDefault();
    show((shown + moves[event.key] + data.points.length) % data.points.length);
  });
})();
