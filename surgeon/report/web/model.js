'use strict';
// What the page knows: elements, the tree of modules, and the coupling graph with its proofs.
const Surgeon = {};

// Returns the data of the page with everything under the names that the rest uses.
Surgeon.model = function (data) {
  const text = (i) => data.strings[i];
  const elements = [];
  const add = (id, kind, name, label, module, more) => {
    const element = Object.assign({ id, kind, name, label, module, order: Infinity }, more);
    elements.push(element);
    return element;
  };
  const inputs = data.inputs.map(([name, type], i) => {
    return add('i' + i, 'input', '%' + name, name, '', { type, order: -1 });
  });
  const params = data.params.map((p, i) => {
    const dot = p.name.lastIndexOf('.');
    return add('p' + i, 'parameter', p.name, p.name.slice(dot + 1), p.name.slice(0, Math.max(dot, 0)), p);
  });
  const ops = data.ops.map(([target, module, source, type, outputs, reads], i) => {
    return add('o' + i, 'operation', outputs.map((o) => '%' + o).join(', '), short(text(target)), text(module), {
      target: text(target), source: text(source), type: text(type), outputs, reads, order: i,
    });
  });
  const axes = data.axes.map((a, i) => add('a' + i, 'axis', a.name, a.role + ':' + a.size, a.scope, a));
  const gone = new Set(data.gone);
  for (const op of ops) if (gone.has(op.order)) op.removed = 1;
  for (const i of data.barriers) ops[i].barrier = true;
  const given = [...inputs, ...params, ...ops];
  const flow = [];
  ops.forEach((op) => {
    for (const i of op.reads) {
      flow.push([given[i], op]);
      if (given[i].kind === 'parameter') given[i].order = Math.min(given[i].order, op.order - 0.5);
    }
  });
  const carries = [];
  axes.forEach((axis) => {
    for (const member of axis.members) {
      member.owner = params[member.param];
      axis.order = Math.min(axis.order, member.owner.order);
      carries.push([member.owner, axis]);
    }
  });
  return {
    data, elements, inputs, params, ops, axes,
    byId: new Map(elements.map((e) => [e.id, e])),
    views: {
      axes: { elements: [...params.filter((p) => p.dims.length), ...axes], edges: carries },
      program: { elements: given, edges: flow },
    },
    coupling: Surgeon.coupling(data.coupling, axes.length),
  };

  function short(target) {
    return target.replace(/^aten\./, '').replace(/\.(default|Tensor)$/, '');
  }
};

// Returns the coupling graph, of which a place is a number.
Surgeon.coupling = function (data, count) {
  const { tensors, places, edges } = data;
  const size = places.length / 4;
  const degree = new Int32Array(size + 1);
  for (let e = 0; e < edges.length; e += 3) { degree[edges[e] + 1]++; degree[edges[e + 1] + 1]++; }
  for (let i = 0; i < size; i++) degree[i + 1] += degree[i];
  const start = degree, fill = Int32Array.from(degree), to = new Int32Array(2 * edges.length / 3), by = new Int32Array(to.length);
  for (let e = 0; e < edges.length; e += 3) {
    const [a, b, op] = [edges[e], edges[e + 1], edges[e + 2]];
    to[fill[a]] = b; by[fill[a]++] = op;
    to[fill[b]] = a; by[fill[b]++] = op;
  }
  const place = (i) => ({ tensor: tensors[places[4 * i]], dim: places[4 * i + 1], position: places[4 * i + 2], axis: places[4 * i + 3] });
  const ties = Array.from({ length: count }, () => new Set());
  for (let e = 0; e < edges.length; e += 3) ties[places[4 * edges[e] + 3]].add(edges[e + 2]);

  // The places where a dimension of a tensor carries an axis.
  function find(tensor, dim, axis) {
    const out = [];
    for (let i = 0; i < size; i++) {
      if (places[4 * i + 3] === axis && places[4 * i + 1] === dim && tensors[places[4 * i]] === tensor) out.push(i);
    }
    return out;
  }

  // The shortest chain of operations from one of some places to one of others, or null.
  function proof(from, goal) {
    const goals = new Set(goal), before = new Map(from.map((i) => [i, null]));
    const queue = [...from];
    for (let head = 0; head < queue.length; head++) {
      let at = queue[head];
      if (goals.has(at)) {
        const steps = [];
        for (let link = before.get(at); link; link = before.get(at)) {
          steps.push({ left: place(link[0]), right: place(at), op: link[1] });
          at = link[0];
        }
        return steps.reverse();
      }
      for (let e = start[at]; e < start[at + 1]; e++) {
        if (!before.has(to[e])) { before.set(to[e], [at, by[e]]); queue.push(to[e]); }
      }
    }
    return null;
  }
  return { ties, find, proof, size, edges: edges.length / 3 };
};

// Returns the tree of modules over some elements. A module with nothing of its own but one module is one
// with it, and an element that is alone in its module stands for it.
Surgeon.tree = function (elements) {
  const make = (path, parent) => ({
    id: 'm:' + path, kind: 'module', path, parent, children: new Map(), items: [], order: Infinity, count: 0, before: 0, after: 0,
  });
  const root = make('', null), found = new Map([['', root]]);
  const at = (path) => {
    let module = found.get(path);
    if (!module) {
      const parent = at(path.includes('.') ? path.slice(0, path.lastIndexOf('.')) : '');
      module = make(path, parent);
      found.set(path, module);
      parent.children.set(path, module);
    }
    return module;
  };
  const home = new Map();
  for (const element of elements) {
    const module = at(element.module);
    module.items.push(element);
    home.set(element, module);
  }
  (function settle(module) {
    for (let child of [...module.children.values()]) {
      settle(child);
      if (!child.items.length && child.children.size === 1) {
        const only = child.children.values().next().value;
        module.children.delete(child.path);
        module.children.set(only.path, only);
        only.parent = module;
        found.delete(child.path);
        child = only;
      }
      if (child.items.length === 1 && !child.children.size && module.path) {
        const [only] = child.items;
        module.children.delete(child.path);
        found.delete(child.path);
        module.items.push(only);
        home.set(only, module);
        continue;
      }
      module.order = Math.min(module.order, child.order);
      module.count += child.count;
      module.before += child.before;
      module.after += child.after;
    }
    for (const item of module.items) {
      module.order = Math.min(module.order, item.order);
      module.count++;
      if (item.elements) {
        module.before += item.elements;
        module.after += item.elements * (1 - (item.removed || 0));
      }
    }
  })(root);
  for (const module of found.values()) {
    if (module.parent) module.label = within(module.path, module.parent);
    if (module.before) module.removed = 1 - module.after / module.before;
  }
  const labels = new Map();
  for (const [element, module] of home) {
    const own = element.kind === 'parameter' ? element.label + ' [' + element.shape.join('×') + ']' : element.label;
    labels.set(element, element.module === module.path || element.kind === 'axis' ? own : within(element.module, module) + '.' + own);
  }
  const modules = [...found.values()].filter((m) => m !== root);
  return { root, home, modules, labels, total: elements.length };

  // A path as it reads inside a module; a number alone would say too little.
  function within(path, outer) {
    const rest = path.slice(outer.path.length).replace(/^\./, '');
    return /^\d+$/.test(rest) ? path.split('.').slice(-2).join('.') : rest;
  }
};

// Returns what is open at first: all of a small graph; of a large one what leads to its numbered layers.
Surgeon.opened = function (tree) {
  const open = new Set([tree.root]);
  for (const module of tree.modules) {
    const layers = [...module.children.values()].some((child) => /^\d+$/.test(child.path.slice(child.path.lastIndexOf('.') + 1)));
    if (tree.total <= 60) open.add(module);
    else if (layers) for (let m = module; m; m = m.parent) open.add(m);
  }
  return open;
};
