'use strict';
// The picture: what is open, what is lit, and how it looks.
Surgeon.view = function (model, container, events) {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const roles = [...new Set(model.axes.map((a) => a.role))];
  const trees = {}, opened = {};
  for (const [name, { elements }] of Object.entries(model.views)) {
    trees[name] = Surgeon.tree(elements);
    opened[name] = Surgeon.opened(trees[name]);
  }
  let current = 'axes', layout = null, byRemoved = Boolean(model.data.pruned), marks = null;
  const cy = cytoscape({
    container, elements: [], style: [], layout: { name: 'preset' }, minZoom: 0.01, maxZoom: 4,
    autoungrabify: true, boxSelectionEnabled: false, autounselectify: true,
    textureOnViewport: true, hideEdgesOnViewport: true, motionBlur: false,
  });

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
  const roleColour = (role) => 'hsl(' + Math.round(40 + roles.indexOf(role) * 137.5) % 360 + ',' + (dark.matches ? '45%,34%)' : '80%,82%)');

  function colour(thing) {
    if (byRemoved && thing.removed !== undefined) return shade(thing.removed);
    if (thing.kind === 'axis') return roleColour(thing.role);
    return { parameter: css('param'), input: css('input') }[thing.kind] || css('node');
  }

  function shade(share) {
    const stops = model.data.scale;
    const at = Math.min(share, 0.9999) * (stops.length - 1), i = Math.floor(at);
    const mixed = stops[i].map((a, k) => Math.round(a + (at - i) * (stops[i + 1][k] - a)));
    return 'rgb(' + mixed.join(',') + ')';
  }

  const ink = (thing) => (byRemoved && thing.removed !== undefined ? (thing.removed > 0.7 ? '#fff' : '#1a1a1a') : css('text'));

  function style() {
    cy.style([
      { selector: 'node', style: {
        shape: 'round-rectangle', width: 'data(w)', height: 'data(h)', label: 'data(label)',
        'background-color': 'data(colour)', color: 'data(ink)', 'font-size': 11.5, 'text-valign': 'center',
        'font-family': 'ui-monospace, Menlo, Consolas, monospace', 'border-width': 1, 'border-color': css('edge'),
        'min-zoomed-font-size': 5, 'z-index-compare': 'manual', 'z-index': 200,
      } },
      { selector: '[kind="axis"]', style: { shape: 'ellipse' } },
      { selector: '[kind="module"]', style: { 'border-width': 2 } },
      { selector: '.pinned', style: { 'border-style': 'dashed' } },
      { selector: '.barrier', style: { 'border-color': css('pin'), 'border-width': 3 } },
      // Open modules are nodes behind the others: the library's own nesting is too slow for thousands.
      { selector: '.open', style: {
        'text-valign': 'top', 'text-halign': 'center', 'text-margin-y': 19, 'z-index': 'data(depth)',
        'background-color': css('soft'), 'background-opacity': 0.06, 'border-width': 1, 'border-color': css('line'), color: css('soft'),
      } },
      { selector: 'edge', style: {
        width: 1, 'line-color': css('edge'), 'target-arrow-color': css('edge'), 'arrow-scale': 0.7,
        'curve-style': 'straight', 'z-index-compare': 'manual', 'z-index': 100, 'target-arrow-shape': current === 'program' ? 'triangle' : 'none', opacity: 0.7,
      } },
      { selector: '.far', style: { 'curve-style': 'unbundled-bezier', 'control-point-distances': 'data(bow)', 'control-point-weights': 0.5 } },
      { selector: '.fan', style: { opacity: 0.16 } }, // what everything reads would hide the rest
      { selector: 'node.faded', style: { opacity: 0.22 } },
      { selector: '.open.faded', style: { opacity: 0.6 } },
      { selector: 'edge.faded', style: { opacity: 0.08, 'target-arrow-shape': 'none' } },
      { selector: '.tie', style: { 'border-color': css('accent'), 'border-width': 2.5 } },
      { selector: '.lit', style: { 'border-color': css('accent'), 'border-width': 4 } },
      { selector: 'edge.tie', style: { 'line-color': css('accent'), 'target-arrow-color': css('accent'), width: 2, opacity: 1 } },
      { selector: '.path', style: { 'border-color': css('path'), 'border-width': 5 } },
      { selector: 'edge.path', style: { 'line-color': css('path'), 'target-arrow-color': css('path'), width: 3, opacity: 1 } },
    ]);
  }

  function draw() {
    const tree = trees[current], { edges } = model.views[current];
    layout = Surgeon.layout(tree, edges, opened[current], current === 'program');
    const nodes = [], at = new Map();
    for (const { thing, open, x, y, w, h } of layout.placed) {
      if (thing === tree.root) continue;
      let depth = 0;
      for (let m = layout.up(thing); m; m = layout.up(m)) depth++;
      const data = {
        id: thing.id, kind: thing.kind, w, h, colour: colour(thing), ink: ink(thing),
        label: open ? thing.label : layout.label(thing), depth,
      };
      const classes = [open ? 'open' : '', thing.pins && thing.pins.length ? 'pinned' : '', thing.barrier ? 'barrier' : ''].join(' ');
      nodes.push({ group: 'nodes', data, classes, position: { x, y } });
      if (!open) at.set(thing, { x, y });
    }
    const fan = new Map();
    for (const { from, to } of layout.links) for (const end of [from, to]) fan.set(end, (fan.get(end) || 0) + 1);
    const lines = layout.links.map(({ id, from, to }) => {
      const a = at.get(from), b = at.get(to), down = b.y - a.y, across = b.x - a.x;
      const far = current === 'program' && Math.abs(down) > 130 && Math.abs(across) < 90;
      const bow = Math.min(170, 40 + Math.abs(down) * 0.14);
      return { group: 'edges', data: { id, source: from.id, target: to.id, bow }, classes: (far ? 'far ' : '') + (Math.max(fan.get(from), fan.get(to)) > 24 ? 'fan' : '') };
    });
    cy.batch(() => {
      cy.elements().remove();
      cy.add([...nodes, ...lines]);
    });
    if (marks) mark(marks);
    events.drawn();
  }

  // Lights up: `lit` are elements, `ties` those that tie them, `path` those of a proof.
  function mark(next) {
    marks = next;
    cy.batch(() => {
      cy.elements().removeClass('faded lit tie path');
      if (!marks) return;
      const classes = new Map();
      for (const [name, found] of [['tie', marks.ties], ['lit', marks.lit], ['path', marks.path]]) {
        for (const element of found || []) {
          if (!trees[current].home.has(element)) continue;
          const thing = layout.shown(element);
          for (let m = layout.up(thing); m; m = layout.up(m)) if (!classes.has(m.id)) classes.set(m.id, '');
          classes.set(thing.id, name);
        }
      }
      cy.nodes().forEach((node) => {
        const name = classes.get(node.id());
        if (name === undefined) node.addClass('faded');
        else if (name) node.addClass(name);
      });
      cy.edges().forEach((edge) => {
        const a = classes.get(edge.data('source')), b = classes.get(edge.data('target'));
        edge.addClass(!a || !b ? 'faded' : a === 'path' && b === 'path' ? 'path' : 'tie');
      });
    });
  }

  function toggle(module, keep = true) {
    const node = cy.getElementById(module.id), before = node.length ? node.renderedPosition() : null;
    const open = opened[current];
    if (open.has(module)) open.delete(module);
    else open.add(module);
    draw();
    const after = cy.getElementById(module.id);
    if (keep && before && after.length) {
      const now = after.renderedPosition();
      cy.panBy({ x: before.x - now.x, y: before.y - now.y });
    }
  }

  function show(name) {
    current = name;
    style();
    draw();
    cy.fit(undefined, 40);
    if (cy.zoom() > 1.3) { cy.zoom(1.3); cy.center(); }
  }

  // Opens what is around an element, and goes there.
  function reveal(elements, { zoom = true } = {}) {
    const tree = trees[current], known = elements.filter((e) => tree.home.has(e) || e.kind === 'module');
    let more = false;
    for (const e of known) {
      for (let m = e.kind === 'module' ? e.parent : tree.home.get(e); m; m = m.parent) {
        if (!opened[current].has(m)) { opened[current].add(m); more = true; }
      }
    }
    if (more) draw();
    if (!zoom || !known.length) return;
    const ids = new Set(known.map((e) => (e.kind === 'module' ? e : layout.shown(e)).id));
    const found = cy.nodes().filter((node) => ids.has(node.id()));
    const box = found.renderedBoundingBox();
    if (box.w > cy.width() || box.h > cy.height() || cy.zoom() < 0.7) {
      cy.fit(found, 90);
      if (cy.zoom() > 1.1) { cy.zoom(1.1); cy.center(found); }
    } else cy.center(found);
  }

  const thing = (id) => model.byId.get(id) || trees[current].modules.find((m) => m.id === id);
  let tapped = null;
  cy.on('tap', (event) => {
    if (event.target === cy) return events.cleared();
    if (!event.target.isNode()) return;
    const found = thing(event.target.id());
    if (tapped && tapped.id === found.id && event.timeStamp - tapped.at < 400) {
      tapped = null;
      if (found.kind === 'module') toggle(found);
      return;
    }
    tapped = { id: found.id, at: event.timeStamp };
    events.chosen(found);
  });
  dark.addEventListener('change', () => { style(); draw(); });

  return {
    cy, show, mark, toggle, reveal, thing, roleColour, shade,
    get current() { return current; },
    get tree() { return trees[current]; },
    isOpen: (module) => opened[current].has(module),
    unfoldAll() { trees[current].modules.forEach((m) => opened[current].add(m)); draw(); cy.fit(undefined, 40); },
    fold() { opened[current] = Surgeon.opened(trees[current]); draw(); cy.fit(undefined, 40); },
    colourBy(removed) { byRemoved = removed; draw(); },
  };
};
