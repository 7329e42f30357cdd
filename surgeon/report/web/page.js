'use strict';
// Ties the model, the picture and the panels together.
(function () {
  const el = (id) => document.getElementById(id);
  const model = Surgeon.model(JSON.parse(el('data').textContent));
  const state = { chosen: null, picks: [] };
  let panel = null;

  const view = Surgeon.view(model, el('graph'), {
    chosen: (thing) => choose(thing),
    cleared: () => choose(null),
    drawn: () => {},
  });

  panel = Surgeon.panel(model, {
    go: (thing) => go(thing),
    pick: (owner, dim) => pick(owner, dim),
    unpick: () => { state.picks = []; refresh(); },
    toggle: (module) => { view.toggle(module); refresh(); },
    isOpen: (module) => view.isOpen(module),
    ties: (axis) => ties(axis),
    view: () => view.current,
    modules: () => view.tree.modules,
    colour: (axis) => (axis.removed !== undefined && model.data.pruned ? view.shade(axis.removed) : view.roleColour(axis.role)),
    proof: (a, b, axis) => chain(a, b, axis),
  });

  function chain(a, b, axis) {
    const places = (p) => model.coupling.find('$' + p.owner.name, p.dim, axis);
    return model.coupling.proof(places(a), places(b));
  }

  // Opens the program where an axis is tied; of one that runs through the whole model, it only lights up where.
  function ties(axis) {
    const ops = [...model.coupling.ties[model.axes.indexOf(axis)]].map((i) => model.ops[i]);
    show('program');
    if (ops.length <= 80) view.reveal([...ops, ...axis.members.map((m) => m.owner)]);
  }

  // The elements to light up for what is chosen and picked.
  function marks() {
    if (state.picks.length === 2) {
      const [a, b] = state.picks, path = new Set([a.owner, b.owner]);
      for (const axis of a.owner.dims[a.dim].axes) {
        if (!b.owner.dims[b.dim].axes.includes(axis)) continue;
        path.add(model.axes[axis]);
        for (const step of chain(a, b, axis) || []) path.add(model.ops[step.op]);
      }
      return { path };
    }
    const thing = state.chosen;
    if (!thing || thing.kind === 'module' || thing.kind === 'input') return null;
    if (thing.kind === 'axis') {
      const ties = [...model.coupling.ties[model.axes.indexOf(thing)]].map((i) => model.ops[i]);
      return { lit: [thing, ...thing.members.map((m) => m.owner)], ties };
    }
    if (thing.kind === 'parameter') {
      const reads = model.inputs.length + model.params.indexOf(thing);
      return { lit: [thing], ties: [...thing.dims.flatMap((d) => d.axes).map((i) => model.axes[i]), ...model.ops.filter((o) => o.reads.includes(reads))] };
    }
    const given = [...model.inputs, ...model.params, ...model.ops], own = model.inputs.length + model.params.length + thing.order;
    return { lit: [thing], ties: [...thing.reads.map((i) => given[i]), ...model.ops.filter((o) => o.reads.includes(own))] };
  }

  function choose(thing) {
    state.chosen = thing;
    refresh();
  }

  function refresh() {
    view.mark(marks());
    el('details').replaceChildren(...(state.chosen ? flat(panel.about(state.chosen)) : welcome()));
    el('proof').replaceChildren(...flat(panel.proof(state.picks)));
    el('colour').setAttribute('aria-pressed', String(!el('legend').hidden));
    for (const name of ['axes', 'program']) el('view-' + name).setAttribute('aria-pressed', String(view.current === name));
  }

  const flat = (content) => content.flat(4).filter((c) => c || c === 0);

  function welcome() {
    const h = Surgeon.html;
    return [
      h('h2', {}, 'What belongs together'),
      h('p', {}, 'An axis is a set of channels that are one and the same thing wherever they appear: to remove one of them is to remove its rows and columns from all members.'),
      h('p', {}, 'Choose an axis to light up its members and, under Program, the operations that tie them. Pick two members to see the chain of operations that makes them one.'),
      h('p', {}, 'A dashed outline cannot be pruned; its details say why.'),
    ];
  }

  function pick(owner, dim) {
    const same = (p) => p.owner === owner && p.dim === dim;
    if (state.picks.some(same)) state.picks = state.picks.filter((p) => !same(p));
    else state.picks = [...state.picks.slice(-1), { owner, dim }];
    refresh();
    if (state.picks.length === 2) el('proof').scrollIntoView({ block: 'nearest' });
  }

  // Chooses something, in the graph that has it, and goes there.
  function go(thing) {
    const has = (name) => model.views[name].elements.includes(thing);
    if (thing.kind !== 'module' && !has(view.current)) {
      if (thing.kind === 'axis') { choose(thing); return; }
      show('program');
    }
    choose(thing);
    view.reveal([thing]);
  }

  function show(name) {
    view.show(name);
    if (state.chosen && state.chosen.kind === 'module') state.chosen = null;
    refresh();
  }

  function search() {
    const words = el('search').value.toLowerCase().split(/\s+/).filter(Boolean);
    el('list').replaceChildren(...(words.length ? panel.results(words) : panel.axesList()));
  }

  const zoom = (factor) => {
    const cy = view.cy;
    cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
  };
  el('view-axes').onclick = () => show('axes');
  el('view-program').onclick = () => show('program');
  el('zoom-in').onclick = () => zoom(1.4);
  el('zoom-out').onclick = () => zoom(1 / 1.4);
  el('fit').onclick = () => view.cy.fit(undefined, 40);
  el('unfold-all').onclick = () => view.unfoldAll();
  el('fold').onclick = () => view.fold();
  el('search').oninput = search;
  el('search').onkeydown = (event) => { if (event.key === 'Enter') { const first = el('list').querySelector('.item'); if (first) first.click(); } };
  document.addEventListener('keydown', (event) => {
    if (event.key === '/' && document.activeElement !== el('search')) { event.preventDefault(); el('search').focus(); }
    if (event.key === 'Escape') { state.picks = []; el('search').value = ''; search(); choose(null); }
  });
  if (model.data.pruned) {
    el('colour').hidden = el('legend').hidden = false;
    el('colour').onclick = () => { el('legend').hidden = !el('legend').hidden; view.colourBy(!el('legend').hidden); refresh(); };
  }
  el('summary').textContent = model.data.summary;
  search();
  show(model.data.view);
  Surgeon.page = { model, view, state, go, pick };
  window.surgeon = Surgeon.page;
  performance.mark('surgeon-ready');
})();
