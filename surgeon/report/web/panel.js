'use strict';
// What is said about what was chosen, and the lists to choose from.
Surgeon.html = function (tag, attributes, ...content) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...content.flat(4).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
};

Surgeon.panel = function (model, act) {
  const h = Surgeon.html;
  const count = (n) => n.toLocaleString('en');
  const percent = (share) => (100 * share).toFixed(share && share < 0.1 ? 1 : 0) + ' %';
  const link = (thing, text) => h('a', { onclick: () => act.go(thing), tabindex: 0, onkeydown: (e) => e.key === 'Enter' && act.go(thing) }, text || thing.name || thing.path);
  const facts = (...pairs) => h('dl', {}, pairs.filter((p) => p && p[1] !== '' && p[1] !== undefined).map(([k, v]) => [h('dt', {}, k), h('dd', {}, v)]));
  const pick = (owner, dim) => h('button', { class: 'small', title: 'pick two of these for the proof that ties them', onclick: () => act.pick(owner, dim) }, 'pick');
  const removed = (thing) => (thing.removed === undefined ? null : ['removed', percent(thing.removed)]);
  const reasons = (title, found, cls) => found.length > 0 && [h('h3', {}, title), h('ul', {}, found.map((r) => h('li', { class: cls }, r)))];

  const about = {
    axis(axis) {
      const lost = axis.lost;
      return [
        h('h2', {}, axis.name),
        h('p', { class: axis.pins.length ? 'pin' : 'ok' }, axis.pins.length ? 'cannot be pruned' : axis.inexact.length ? 'prunable, not exactly' : 'prunable'),
        facts(
          ['channels', count(axis.size)],
          removed(axis), axis.kept !== undefined && axis.kept !== axis.size ? ['kept', count(axis.kept)] : null,
          ['role', axis.role],
          ['within', axis.outer.join(' × ')],
          ['change of basis', axis.gauge],
          ['one index is', count(lost) + ' parameters'],
          ['tied by', count(model.coupling.ties[model.axes.indexOf(axis)].size) + ' operations'],
        ),
        h('div', { class: 'row' }, h('button', { id: 'ties', onclick: () => act.ties(axis) }, 'Show the operations that tie it')),
        reasons('Why it can’t be pruned', axis.pins, 'pin'),
        reasons('Why removing is not masking', axis.inexact, ''),
        h('h3', {}, 'Members: what goes with one index'),
        h('ul', {}, axis.members.slice(0, 200).map((m) => h('li', {},
          h('div', { class: 'row' }, link(m.owner), pick(m.owner, m.dim)),
          h('div', { class: 'soft' }, 'dimension ' + m.dim + ', ' + count(m.lines) + ' of ' + count(m.owner.shape[m.dim]) + (m.dim ? ' columns' : ' rows'))))),
        axis.members.length > 200 && h('p', { class: 'soft' }, 'and ' + (axis.members.length - 200) + ' more; search finds them'),
      ];
    },
    parameter(p) {
      return [
        h('h2', {}, p.name),
        facts(['type', p.type], removed(p), ['parameters', count(p.elements)], ['also called', p.aliases.join(', ')]),
        h('h3', {}, 'Dimensions'),
        h('ul', {}, p.dims.map((d, dim) => h('li', {},
          h('div', { class: 'row' }, h('code', {}, dim + ': ' + (d.text || '1')), pick(p, dim)),
          d.axes.map((a) => h('div', {}, link(model.axes[a])))))),
        h('h3', {}, 'Read by'),
        h('ul', {}, model.ops.filter((o) => o.reads.includes(model.inputs.length + model.params.indexOf(p))).map((o) => h('li', {}, link(o, o.target), ' ', h('span', { class: 'soft' }, o.source)))),
      ];
    },
    operation(op) {
      const given = [...model.inputs, ...model.params, ...model.ops];
      const tied = model.axes.filter((a, i) => model.coupling.ties[i].has(op.order));
      return [
        h('h2', {}, op.target),
        op.barrier && h('p', { class: 'pin' }, 'no rule: what it touches stays as it is'),
        facts(['makes', op.name], ['type', op.type], ['module', op.module], ['source', op.source]),
        h('h3', {}, 'Reads'),
        h('ul', {}, op.reads.map((i) => h('li', {}, link(given[i])))),
        tied.length > 0 && [h('h3', {}, 'Ties places of'), h('ul', {}, tied.map((a) => h('li', {}, link(a))))],
      ];
    },
    input(input) {
      return [h('h2', {}, input.name), facts(['input', input.type])];
    },
    module(module) {
      const inside = (e) => e.module === module.path || e.module.startsWith(module.path + '.');
      const axes = model.axes.filter(inside);
      return [
        h('h2', {}, module.path),
        facts(['holds', count(module.count) + (act.view() === 'axes' ? ' axes and parameters' : ' operations and parameters')], ['parameters', module.before ? count(module.before) : ''], removed(module)),
        h('div', { class: 'row' }, h('button', { onclick: () => act.toggle(module) }, act.isOpen(module) ? 'Fold' : 'Unfold')),
        axes.length > 0 && [h('h3', {}, 'Axes of its own'), h('ul', {}, axes.slice(0, 60).map((a) => h('li', {}, link(a), ' ', h('span', { class: 'soft' }, count(a.size)))))],
      ];
    },
  };

  const colour = (thing) => h('i', { style: 'background:' + (thing.kind === 'axis' ? act.colour(thing) : 'var(--edge)') });
  const row = (thing, name, note) => h('button', { class: 'item', onclick: () => act.go(thing) }, colour(thing), h('b', {}, broken(name)), h('span', {}, note));
  const broken = (name) => name.split(/(?<=[./])/).flatMap((part) => [part, h('wbr')]);
  const fold = (name) => name.replace(/(^|\.)\d+(?=[./]|$)/g, '$1*');

  // The axes, those that differ by their layer only in one line.
  function axesList() {
    const groups = new Map();
    for (const axis of model.axes) {
      const key = fold(axis.name) + ' ' + axis.size;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(axis);
    }
    return [...groups.values()].map((found) => {
      if (found.length === 1) return row(found[0], found[0].name, count(found[0].size));
      const inner = h('div', {}), outer = h('details', {},
        h('summary', { class: 'item' }, colour(found[0]), h('b', {}, broken(fold(found[0].name))), h('span', {}, count(found[0].size) + ' ×' + found.length)), inner);
      outer.addEventListener('toggle', () => { if (!inner.childNodes.length) inner.append(...found.map((a) => row(a, a.name, percentOr(a)))); });
      return outer;
    });
  }
  const percentOr = (a) => (a.removed ? '−' + percent(a.removed) : count(a.size));

  function results(words) {
    const has = (text) => { const t = text.toLowerCase(); return words.every((w) => t.includes(w)); };
    const take = (title, found, name, note) => found.length > 0 && [
      h('h3', {}, title + ' · ' + count(found.length)),
      found.slice(0, 40).map((e) => row(e, name(e), note(e))),
    ];
    const out = [
      take('axes', model.axes.filter((a) => has(a.name + ' ' + a.role)), (a) => a.name, (a) => count(a.size)),
      take('parameters', model.params.filter((p) => has(p.name)), (p) => p.name, (p) => p.shape.join('×')),
      take('modules', act.modules().filter((m) => has(m.path)), (m) => m.path, () => ''),
      take('operations', model.ops.filter((o) => has(o.target + ' ' + o.name + ' ' + o.module + ' ' + o.source)), (o) => o.module + ' ' + o.target, () => ''),
    ].flat(2).filter(Boolean);
    return out.length ? out : [h('p', { class: 'soft' }, 'nothing is called that')];
  }

  function proof(picks) {
    if (!picks.length) return [];
    const name = (p) => p.owner.name + ':' + p.dim;
    const head = [h('h2', {}, 'Proof'), h('ul', {}, picks.map((p) => h('li', {}, h('div', { class: 'row' }, link(p.owner, name(p)))))), h('button', { class: 'small', onclick: act.unpick }, 'clear')];
    if (picks.length < 2) return [...head, h('p', { class: 'soft' }, 'pick another dimension to see what ties the two')];
    const [a, b] = picks, shared = a.owner.dims[a.dim].axes.filter((x) => b.owner.dims[b.dim].axes.includes(x));
    if (!shared.length) return [...head, h('p', {}, 'Not coupled: no chain of operations makes a channel of one a channel of the other.')];
    return [...head, shared.map((index) => {
      const steps = act.proof(a, b, index), axis = model.axes[index];
      if (!steps) return h('p', {}, 'Both carry ', link(axis), ', in parts that no single chain joins.');
      return [
        h('p', {}, h('b', {}, 'One and the same: '), link(axis)),
        steps.length ? h('ol', {}, steps.map((s) => {
          const op = model.ops[s.op];
          return h('li', {},
            h('div', {}, h('code', {}, place(s.left)), ' is ', h('code', {}, place(s.right))),
            h('div', { class: 'soft' }, 'by ', link(op, op.target), op.source ? ' at ' + op.source : '', op.module ? ', ' + op.module : ''));
        })) : h('p', {}, 'They are one place.'),
      ];
    })];
  }
  const place = (p) => p.tensor + ' dim ' + p.dim + (p.position ? ' [' + p.position + ']' : '');

  return { about: (thing) => about[thing.kind](thing), axesList, results, proof };
};
