"use strict";
// Shows what is under the pointer, or at the place that the arrow keys have gone to; the charts are there without it.
(() => {
  const tip = document.getElementById("tip");
  const group = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

  const plain = (v) => {
    const size = Math.abs(v);
    if (Number.isInteger(v) && size < 1e12) return group.format(v);
    if (size >= 1000) return size < 1e12 ? group.format(v) : v.toExponential(3);
    return String(Number(v.toPrecision(5)));
  };
  const bytes = (v) => {
    for (const [size, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
      if (Math.abs(v) >= size) return (v / size).toFixed(2) + " " + name;
    return plain(v) + " B";
  };
  const seconds = (v) => {
    const size = Math.abs(v);
    if (size >= 1) return v.toFixed(3) + " s";
    return size >= 1e-3 ? (v * 1e3).toFixed(2) + " ms" : (v * 1e6).toFixed(0) + " µs";
  };
  const written = (v, unit) => {
    if (v === null || v === undefined) return "–";
    if (unit === "bytes") return bytes(v);
    if (unit === "bytes/s") return bytes(v) + "/s";
    if (unit === "seconds") return seconds(v);
    if (unit === "fraction") return (v * 100).toFixed(2) + " %";
    if (unit === "rank") return "rank " + plain(v);
    return ["number", "count", "text"].includes(unit) ? plain(v) : (plain(v) + " " + unit).trim();
  };

  const put = (x, y) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), margin = 8, gap = 14;
    const left = x + gap + box.width + margin > innerWidth ? x - gap - box.width : x + gap;
    const top = y + gap + box.height + margin > innerHeight ? y - gap - box.height : y + gap;
    tip.style.transform = `translate(${Math.round(Math.max(margin, Math.min(left, innerWidth - box.width - margin)))}px,${Math.round(Math.max(margin, top))}px)`;
  };
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".hair").forEach((hair) => hair.remove());
  };
  const cell = (row, text) => { row.insertCell().textContent = text; return row.lastChild; };

  const nearest = (list, step) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] <= step) low = middle; else high = middle;
    }
    return Math.abs(list[high] - step) < Math.abs(list[low] - step) ? high : low;
  };

  // What a chart says of a step: of each line the place that is nearest to it.
  const show = (field, data, step, x, y) => {
    const table = document.createElement("table"), rows = [];
    let at = step, range = "", sum = 0;
    for (const line of data.series) {
      const places = line.at || data.at;
      if (!places.length) continue;
      const index = nearest(places, step), mean = line.mean[index];
      at = places[index];
      const to = line.to ? line.to[index] : at;
      range = to > at ? `steps ${group.format(at)} to ${group.format(to)}` : `step ${group.format(Math.round(at))}`;
      sum += mean || 0;
      rows.push([line, mean, line.low && line.high[index] > line.low[index] ? [line.low[index], line.high[index]] : null]);
    }
    if (data.stack) rows.reverse();
    for (const [line, mean, bounds] of rows) {
      const row = table.insertRow(), swatch = document.createElement("i");
      swatch.className = "f" + line.colour;
      const name = cell(row, line.name);
      name.prepend(swatch);
      cell(row, written(mean, data.unit));
      cell(row, bounds ? `${written(bounds[0], data.unit)} – ${written(bounds[1], data.unit)}` : "");
    }
    if (data.stack) { const row = table.insertRow(); cell(row, "together"); cell(row, written(sum, data.unit)); cell(row, ""); }
    const head = document.createElement("div");
    head.textContent = range;
    tip.replaceChildren(head, table);
    const [low, high] = data.x;
    document.querySelectorAll(".hair").forEach((hair) => hair.remove());
    // The same step in every chart.
    for (const other of document.querySelectorAll(".field")) {
      const hair = document.createElement("i");
      hair.className = "hair";
      hair.style.left = ((at - low) / (high - low)) * 100 + "%";
      other.append(hair);
    }
    put(x, y);
    return at;
  };

  for (const field of document.querySelectorAll(".field")) {
    const data = JSON.parse(field.closest("figure").querySelector("script").textContent);
    const [low, high] = data.x;
    let now = null;
    field.addEventListener("pointermove", (event) => {
      const box = field.getBoundingClientRect();
      now = show(field, data, low + ((event.clientX - box.left) / box.width) * (high - low), event.clientX, event.clientY);
    });
    field.addEventListener("pointerleave", hide);
    field.addEventListener("blur", hide);
    field.addEventListener("keydown", (event) => {
      const places = data.at || data.series.flatMap((line) => line.at).sort((a, b) => a - b);
      if (event.key === "Escape") return hide();
      if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key) || !places.length) return;
      event.preventDefault();
      const index = now === null ? -1 : nearest(places, now);
      const next = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: places.length - 1 }[event.key];
      now = places[Math.max(0, Math.min(next, places.length - 1))];
      const box = field.getBoundingClientRect();
      show(field, data, now, box.left + ((now - low) / (high - low)) * box.width, box.top + box.height / 2);
    });
  }
  for (const item of document.querySelectorAll("[data-tip]")) {
    item.addEventListener("pointermove", (event) => {
      event.stopPropagation();
      tip.textContent = item.dataset.tip;
      put(event.clientX, event.clientY);
    });
    item.addEventListener("pointerleave", hide);
  }
})();
