'use strict';
// Where everything stands: each open module is a block that is laid out by itself, then placed in its own.
Surgeon.layout = function (tree, edges, open, directed) {
  const GAP_X = 22, GAP_Y = directed ? 34 : 12, PAD = 16, TITLE = 22, TALL = 1000;
  const label = (thing) => (thing.kind === 'module' ? thing.label + (thing.count > 1 ? '  ▸ ' + thing.count : '') : tree.labels.get(thing));
  const up = (thing) => (thing.kind === 'module' ? thing.parent : tree.home.get(thing));

  // The way from the root to what stands for an element: itself, or the outermost closed module around it.
  const ways = new Map();
  function way(element) {
    let found = ways.get(element);
    if (found) return found;
    found = [];
    for (let m = tree.home.get(element); m; m = m.parent) found.push(m);
    found.reverse();
    const closed = found.findIndex((m) => !open.has(m));
    found = closed < 0 ? [...found, element] : found.slice(0, closed + 1);
    ways.set(element, found);
    return found;
  }

  const local = new Map(), links = new Map();
  for (const [from, to] of edges) {
    const a = way(from), b = way(to);
    const [u, v] = [a[a.length - 1], b[b.length - 1]];
    if (u === v) continue;
    const key = u.id + ' ' + v.id;
    if (links.has(key)) { links.get(key).times++; continue; }
    links.set(key, { id: key, from: u, to: v, times: 1 });
    let i = 0;
    while (a[i] === b[i]) i++;
    if (!local.has(a[i - 1])) local.set(a[i - 1], []);
    local.get(a[i - 1]).push([a[i], b[i]]);
  }

  const placed = [];

  function box(thing) {
    if (thing.kind === 'module' && open.has(thing)) {
      const inner = block(thing);
      const w = Math.max(inner.w, 7.1 * thing.label.length) + 2 * PAD, h = inner.h + 2 * PAD + TITLE;
      return {
        thing, w, h,
        put(x, y) {
          placed.push({ thing, open: true, x: x + w / 2, y: y + h / 2, w, h });
          inner.put(x + (w - inner.w) / 2, y + PAD + TITLE);
        },
      };
    }
    const lines = label(thing).split('\n');
    const w = Math.max(46, 7.1 * Math.max(...lines.map((l) => l.length)) + 18), h = 15 * lines.length + 13;
    return { thing, w, h, put(x, y) { placed.push({ thing, x: x + w / 2, y: y + h / 2, w, h }); } };
  }

  function block(module) {
    const things = [...module.items, ...module.children.values()];
    things.sort((a, b) => (a.order > b.order) - (a.order < b.order)); // both may be infinite
    const rows = directed ? ranked(things, local.get(module) || []) : sides(things);
    const made = rows.map((row) => ({ cells: row.map(box) }));
    for (const row of made) {
      row.w = row.cells.reduce((sum, cell) => sum + cell.w + GAP_X, -GAP_X);
      row.h = Math.max(...row.cells.map((cell) => cell.h));
    }
    const side = directed ? null : made.pop();
    const columns = wrapped(made);
    let x = 0, tallest = 0;
    for (const column of columns) {
      column.w = Math.max(0, ...column.map((row) => row.w));
      column.h = column.reduce((sum, row) => sum + row.h + GAP_Y, -GAP_Y);
      column.x = x;
      x += column.w + 2.2 * GAP_X;
      tallest = Math.max(tallest, column.h);
    }
    if (side && side.cells.length) {
      const w = Math.max(...side.cells.map((cell) => cell.w));
      const h = side.cells.reduce((sum, cell) => sum + cell.h + 18, -18);
      if (columns.length) x += 70;
      side.x = x; side.w = w; side.total = h;
      x += w + 2.2 * GAP_X;
      tallest = Math.max(tallest, h);
    }
    return {
      w: Math.max(40, x - 2.2 * GAP_X), h: Math.max(20, tallest),
      put(left, top) {
        for (const column of columns) {
          let y = top + (columns.length > 1 ? 0 : (tallest - column.h) / 2);
          for (const row of column) {
            let at = left + column.x + (column.w - row.w) / 2;
            for (const cell of row.cells) {
              cell.put(at, y + (row.h - cell.h) / 2);
              at += cell.w + GAP_X;
            }
            y += row.h + GAP_Y;
          }
        }
        if (side && side.cells.length) {
          let y = top + (tallest - side.total) / 2;
          for (const cell of side.cells) { cell.put(left + side.x + (side.w - cell.w) / 2, y); y += cell.h + 18; }
        }
      },
    };
  }

  // Rows by the longest way from the top; what nothing feeds stands just above its first reader.
  function ranked(things, edges) {
    const index = new Map(things.map((t, i) => [t, i]));
    const into = things.map(() => []), out = things.map(() => []);
    for (const [a, b] of edges) {
      const i = index.get(a), j = index.get(b);
      if (i < j) { into[j].push(i); out[i].push(j); }
    }
    const rank = new Int32Array(things.length);
    things.forEach((_, j) => { for (const i of into[j]) rank[j] = Math.max(rank[j], rank[i] + 1); });
    things.forEach((_, i) => { if (!into[i].length && out[i].length) rank[i] = Math.max(0, Math.min(...out[i].map((j) => rank[j])) - 1); });
    const rows = [];
    things.forEach((_, i) => { (rows[rank[i]] = rows[rank[i]] || []).push(i); });
    const place = new Float64Array(things.length);
    for (const row of rows.filter(Boolean)) {
      const middle = new Map(row.map((i) => [i, into[i].length ? into[i].reduce((s, j) => s + place[j], 0) / into[i].length : 0]));
      row.sort((a, b) => middle.get(a) - middle.get(b) || a - b);
      row.forEach((i, k) => { place[i] = k - (row.length - 1) / 2; });
    }
    return rows.filter(Boolean).map((row) => row.map((i) => things[i]));
  }

  // Parameters and modules one below another, and their axes beside them.
  function sides(things) {
    const rows = things.filter((t) => t.kind !== 'axis').map((t) => [t]);
    return [...rows, things.filter((t) => t.kind === 'axis')];
  }

  // A long run of rows becomes columns, as in a newspaper.
  function wrapped(rows) {
    const total = rows.reduce((sum, row) => sum + row.h + GAP_Y, 0);
    if (total <= TALL) return rows.length ? [rows] : [];
    const widest = rows.reduce((sum, row) => sum + row.w, 0) / rows.length + 2.2 * GAP_X;
    const height = Math.max(TALL * 0.6, Math.sqrt(total * widest / 1.6));
    const columns = [[]];
    let y = 0;
    for (const row of rows) {
      if (y && y + row.h > height) { columns.push([]); y = 0; }
      columns[columns.length - 1].push(row);
      y += row.h + GAP_Y;
    }
    return columns;
  }

  block(tree.root).put(0, 0);
  return { placed, links: [...links.values()], label, shown: (element) => { const w = way(element); return w[w.length - 1]; }, up };
};
