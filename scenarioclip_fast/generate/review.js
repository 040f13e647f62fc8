
"use strict";
(() => {
  const COLOURS = ["#c0392b", "#1f6fb2", "#2f7d4f", "#9a6700", "#7a4fb0", "#b03a78", "#0f7b80", "#8a5a2b", "#4b5bd6", "#5c6b2a"];
  const $ = (id) => document.getElementById(id);
  const json = (id) => JSON.parse($(id).textContent);
  const { run, total, scenes } = json("index");
  const STORE = `scenarioclip-fast review ${run}`;
  const decisions = new Map(); // key -> the member of "scenes" in decisions.json
  const undone = []; // {at, before: [[key, entry or undefined], ...]}
  let at = 0; // position of the scene
  let scene = null; // its data
  let masks = []; // Uint8Array [H * W] per object, or null
  let selected = null; // {kind: "objects" or "relations", k}
  let editing = null; // the same, or {kind: "action"}
  let marks = true;
  let stored = true;
  let timer = 0;
  let pressed = false; // a pointer is down

  // ---- decisions

  const entryOf = (i) => decisions.get(scenes[i].key) ?? {};
  const partOf = (kind, k) => entryOf(at)[kind]?.[scene[kind][k].id] ?? {};
  const FIELD = { objects: "name", relations: "predicate" };
  const textOf = (kind, k) => partOf(kind, k)[FIELD[kind]] ?? scene[kind][k][FIELD[kind]];
  const isRejected = (kind, k) => partOf(kind, k).reject === true;
  const isDecided = (i) => decisions.has(scenes[i].key);
  const isChanged = (i) => Object.keys(entryOf(i)).some((name) => name !== "scene");

  function isLost(k) { // a relation without one of its objects
    const relation = scene.relations[k];
    return isRejected("objects", relation.subject) || isRejected("objects", relation.object);
  }

  function tidy(entry) {
    for (const kind of ["objects", "relations"]) {
      for (const [id, part] of Object.entries(entry[kind] ?? {})) if (!Object.keys(part).length) delete entry[kind][id];
      if (entry[kind] && !Object.keys(entry[kind]).length) delete entry[kind];
    }
    return entry;
  }

  function replaceEntries(changes) { // [[key, entry or undefined], ...]
    for (const [key, entry] of changes) {
      if (entry && Object.keys(entry).length) decisions.set(key, entry);
      else decisions.delete(key);
    }
    store();
  }

  function change(apply) {
    const key = scenes[at].key;
    const entry = structuredClone(entryOf(at));
    apply(entry);
    tidy(entry);
    if (JSON.stringify(entry) === JSON.stringify(entryOf(at))) return;
    undone.push({ at, before: [[key, decisions.get(key)]] });
    replaceEntries([[key, entry]]);
  }

  function changePart(kind, k, apply) {
    change((entry) => {
      const parts = (entry[kind] ??= {});
      apply((parts[scene[kind][k].id] ??= {}));
    });
  }

  function exported() {
    const sorted = [...decisions].sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
    return JSON.stringify({ schema: 1, scenes: Object.fromEntries(sorted) }, null, 1) + "\n";
  }

  function parsed(text) { // -> [[key, entry], ...]
    const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
    const expect = (condition, what) => {
      if (!condition) throw new Error(`expected ${what}`);
    };
    const file = JSON.parse(text);
    expect(isObject(file) && file.schema === 1 && isObject(file.scenes), 'decisions of this page, {"schema": 1, "scenes": {...}}');
    return Object.entries(file.scenes).map(([key, from]) => {
      expect(isObject(from), `an object for scene ${key}`);
      const entry = {};
      if (from.scene !== undefined) {
        expect(from.scene === "accept" || from.scene === "reject", `"accept" or "reject" for scene ${key}`);
        entry.scene = from.scene;
      }
      if (from.action !== undefined) {
        expect(typeof from.action === "string", `a text as the action of scene ${key}`);
        entry.action = from.action;
      }
      for (const kind of ["objects", "relations"]) {
        expect(from[kind] === undefined || isObject(from[kind]), `an object as the ${kind} of scene ${key}`);
        for (const [id, part] of Object.entries(from[kind] ?? {})) {
          const text = isObject(part) ? part[FIELD[kind]] : null;
          expect(/^\d+$/.test(id) && (text === undefined || typeof text === "string"), `valid ${kind} of scene ${key}`);
          const kept = ((entry[kind] ??= {})[id] = {});
          if (part.reject === true) kept.reject = true;
          if (text !== undefined) kept[FIELD[kind]] = text;
        }
      }
      return [key, tidy(entry)];
    });
  }

  function store() {
    try {
      localStorage.setItem(STORE, exported());
      stored = true;
    } catch {
      if (stored) say("This browser keeps no data of the page: save decisions.json before you close it");
      stored = false;
    }
  }

  function restore() {
    try {
      const text = localStorage.getItem(STORE);
      decisions.clear();
      if (text) for (const [key, entry] of parsed(text)) decisions.set(key, entry);
    } catch {
      stored = false;
    }
  }

  // ---- elements

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function button(text, label, pressed, action, className) {
    const element = make("button", { type: "button", textContent: text, title: label, className, onclick: action });
    element.setAttribute("aria-label", label);
    if (pressed !== null) element.setAttribute("aria-pressed", String(pressed));
    return element;
  }

  function say(text) {
    $("status").textContent = text;
    clearTimeout(timer);
    timer = setTimeout(() => ($("status").textContent = ""), 5000);
  }

  const colour = (k) => COLOURS[k % COLOURS.length];
  const tinted = (element, k) => (element.style.setProperty("--c", colour(k)), element);
  const countOf = (n) => `${n} ${n === 1 ? "scene" : "scenes"}`;
  const brief = (text) => (text.length > 60 ? `${text.slice(0, 57)}...` : text);

  // ---- masks

  function decode(counts, [height, width]) { // COCO run lengths, in columns -> Uint8Array, in rows
    const runs = [];
    for (let i = 0; i < counts.length; ) {
      let value = 0, shift = 0, code;
      do {
        code = counts.charCodeAt(i++) - 48;
        value |= (code & 31) << shift;
        shift += 5;
      } while (code & 32);
      if (code & 16) value |= -1 << shift;
      runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
    }
    const mask = new Uint8Array(height * width);
    let place = 0;
    runs.forEach((length, i) => {
      if (i % 2) for (let p = place; p < place + length; p++) mask[(p % height) * width + Math.floor(p / height)] = 1;
      place += length;
    });
    return mask;
  }

  function isHighlighted(k) {
    if (!selected) return true;
    if (selected.kind === "objects") return selected.k === k;
    const { subject, object } = scene.relations[selected.k];
    return k === subject || k === object;
  }

  function drawMasks() {
    const [height, width] = scene.size;
    const canvas = $("masks");
    canvas.width = width;
    canvas.height = height;
    if (!marks) return;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(width, height);
    masks.forEach((mask, k) => {
      if (!mask || isRejected("objects", k)) return;
      const rgb = [1, 3, 5].map((i) => parseInt(colour(k).slice(i, i + 2), 16));
      const [fill, edge] = isHighlighted(k) ? [20, 255] : [8, 90]; // weak, so that the colours of objects can be judged
      for (let y = 0, p = 0; y < height; y++) {
        for (let x = 0; x < width; x++, p++) {
          if (!mask[p]) continue;
          const inner = x && y && x < width - 1 && y < height - 1 && mask[p - 1] && mask[p + 1] && mask[p - width] && mask[p + width];
          const alpha = inner ? fill : edge;
          // Where masks overlap, outlines are over fills.
          if (alpha >= picture.data[4 * p + 3]) picture.data.set([...rgb, alpha], 4 * p);
        }
      }
    });
    context.putImageData(picture, 0, 0);
  }

  function drawBoxes() {
    const [height, width] = scene.size;
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    const boxes = scene.objects.map(({ box: [x1, y1, x2, y2] }, k) => {
      const element = tinted(make("div", { className: "box" }, make("span", { textContent: `${k + 1} ${brief(textOf("objects", k))}` })), k);
      element.classList.toggle("off", isRejected("objects", k));
      element.classList.toggle("dim", !isHighlighted(k));
      element.classList.toggle("on", selected !== null && isHighlighted(k));
      element.classList.toggle("inside", y1 < 0.07 * height);
      element.classList.toggle("leftwards", x1 + x2 > width);
      Object.assign(element.style, { left: percent(x1, width), top: percent(y1, height) });
      Object.assign(element.style, { width: percent(x2 - x1, width), height: percent(y2 - y1, height) });
      return element;
    });
    $("boxes").replaceChildren(...(marks ? boxes : []));
  }

  function objectAt(x, y) { // the smallest mask, else the smallest box, at a pixel
    const [, width] = scene.size;
    const found = scene.objects.map(({ box: [x1, y1, x2, y2] }, k) => {
      const inMask = masks[k]?.[y * width + x];
      const inBox = x1 <= x && x < x2 && y1 <= y && y < y2;
      return { k, rank: inMask ? 0 : inBox ? 1 : 2, area: (x2 - x1) * (y2 - y1) };
    });
    const best = found.filter(({ rank }) => rank < 2).sort((a, b) => a.rank - b.rank || a.area - b.area)[0];
    return best ? best.k : null;
  }

  // ---- the lists

  function field(kind, k, text, label) {
    const input = make("input", { type: "text", value: text, id: "edit", autocomplete: "off", spellcheck: true });
    input.dir = "auto";
    input.setAttribute("aria-label", label);
    input.onkeydown = (event) => {
      if (event.key === "Enter") endEdit(input.value);
      else if (event.key === "Escape") endEdit(null);
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    input.onblur = () => {
      if (!isEditing(kind, k) || !input.isConnected) return;
      if (!pressed) return endEdit(input.value);
      commit(input.value); // drawing now would remove the button under the pointer before its click
      const later = () => setTimeout(() => editing || draw());
      for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, later, { once: true });
    };
    return input;
  }

  const isEditing = (kind, k) => editing !== null && editing.kind === kind && editing.k === k;

  function drawAction() {
    const text = entryOf(at).action ?? scene.action ?? "";
    const row = make("div", { className: "row" });
    if (isEditing("action", undefined)) row.append(field("action", undefined, text, "Action"));
    else {
      const part = make("button", { type: "button", className: "part", title: "Edit the action (e)" });
      part.onclick = () => edit({ kind: "action" });
      part.id = "part-action";
      part.append(make("span", { className: "text", textContent: text || "(none)" }));
      if (entryOf(at).action !== undefined && scene.action) part.append(make("s", { className: "text was", textContent: scene.action }));
      row.append(part, button("Edit", "Edit the action", null, () => edit({ kind: "action" }), "small"));
      row.lastChild.id = "edit-action";
    }
    $("action").replaceChildren(row);
  }

  function line(kind, k, content, label, note) {
    const item = make("li");
    const row = make("div", { className: "row" });
    item.append(row);
    item.classList.toggle("on", selected !== null && selected.kind === kind && selected.k === k);
    item.classList.toggle("off", isRejected(kind, k) || (kind === "relations" && isLost(k)));
    const id = `${kind}-${k}`;
    if (isEditing(kind, k)) {
      row.append(field(kind, k, textOf(kind, k), kind === "objects" ? `Name of object ${k + 1}` : `Predicate of relation ${k + 1}`));
      return item;
    }
    const part = make("button", { type: "button", className: "part", id: `part-${id}`, onclick: () => select({ kind, k }) });
    part.setAttribute("aria-pressed", String(item.classList.contains("on")));
    part.append(...content);
    row.append(part);
    if (note) part.append(make("span", { className: "note", textContent: note }));
    row.append(button("Edit", `Edit ${label}`, null, () => edit({ kind, k }), "small"));
    row.lastChild.id = `edit-${id}`;
    row.append(button("Reject", `Reject ${label}`, isRejected(kind, k), () => toggle({ kind, k }), "small toggle"));
    row.lastChild.id = `toggle-${id}`;
    return item;
  }

  function drawObjects() {
    $("scores").hidden = scene.objects.every(({ score }) => score === null);
    $("objects").replaceChildren(
      ...scene.objects.map((object, k) => {
        const content = [tinted(make("span", { className: "number", textContent: k + 1 }), k)];
        content.push(make("span", { className: "text", textContent: textOf("objects", k) }));
        if (textOf("objects", k) !== object.name) content.push(make("s", { className: "text was", textContent: object.name }));
        const note = [object.mask === null ? "no mask" : "", object.score === null ? "" : object.score.toFixed(2)];
        return line("objects", k, content, `object ${k + 1}`, note.filter(Boolean).join(", "));
      }),
    );
  }

  function drawRelations() {
    const lines = scene.relations.map((relation, k) => {
      const end = (i) => tinted(make("span", { className: "end", textContent: textOf("objects", i) }), i);
      const predicate = make("span", { textContent: ` ${textOf("relations", k)} ` });
      const text = make("span", { className: "text" }, end(relation.subject), predicate, end(relation.object));
      const content = [make("span", { className: "number", textContent: k + 1 }), text];
      if (textOf("relations", k) !== relation.predicate) content.push(make("s", { className: "text was", textContent: relation.predicate }));
      const item = line("relations", k, content, `relation ${k + 1}`, isLost(k) ? "object rejected" : "");
      if (item.classList.contains("on")) item.append(detail(relation));
      return item;
    });
    $("relations").replaceChildren(...(lines.length ? lines : [make("li", { className: "note", textContent: "none" })]));
  }

  function detail(relation) {
    const element = make("div", { className: "detail" });
    if (relation.region) {
      const image = make("img", { src: relation.region, id: "region", width: 224, height: 224 });
      image.alt = "Focused region of the relation, as the model sees it";
      element.append(image);
    } else element.append(make("span", { className: "note", textContent: "No focused region: a mask is missing." }));
    if (relation.negatives.length) {
      const list = make("ul", {}, ...relation.negatives.map((text) => make("li", { textContent: text })));
      element.append(make("div", { className: "note" }, "Negatives:", list));
    }
    return element;
  }

  // ---- the page

  const FILTERS = {
    all: () => true,
    undecided: (i) => !isDecided(i),
    accepted: (i) => entryOf(i).scene === "accept",
    rejected: (i) => entryOf(i).scene === "reject",
    changed: isChanged,
  };
  const matches = (i) => FILTERS[$("filter").value](i);

  function draw() {
    const focused = document.activeElement?.id;
    const entry = entryOf(at);
    drawMasks();
    drawBoxes();
    drawAction();
    drawObjects();
    drawRelations();
    const badge = { accept: "accepted", reject: "rejected" }[entry.scene] ?? "";
    $("badge").textContent = badge + (isChanged(at) ? `${badge && ", "}changed` : "");
    $("badge").className = `badge ${entry.scene ?? ""}`;
    for (const what of ["accept", "reject"]) $(what).setAttribute("aria-pressed", String(entry.scene === what));
    const decided = scenes.filter((_, i) => isDecided(i)).length;
    $("bar").max = scenes.length;
    $("bar").value = decided;
    $("count").textContent = `${decided} of ${countOf(scenes.length)} with decisions`;
    $("undo").disabled = undone.length === 0;
    $("previous").disabled = neighbour(-1) === null;
    $("next").disabled = neighbour(1) === null;
    $("marks").setAttribute("aria-pressed", String(marks));
    if (editing) {
      $("edit").focus();
      if (focused !== "edit") $("edit").select();
    } else if (focused && document.activeElement?.id !== focused) $(focused)?.focus();
  }

  function show(i) {
    at = i;
    scene = json(`scene-${i}`);
    masks = scene.objects.map(({ mask }) => (mask === null ? null : decode(mask, scene.size)));
    selected = editing = null;
    const [height, width] = scene.size;
    $("image").src = scene.image;
    $("image").alt = `Image ${i + 1}: ${brief(scene.caption ?? scene.action ?? scenes[i].name)}`;
    $("stage").style.aspectRatio = `${width} / ${height}`;
    $("stage").style.width = `min(100%, ${(68 * width) / height}vh, ${Math.max(2 * width, 640)}px)`;
    $("jump").value = i + 1;
    $("name").textContent = `${scenes[i].name}, ${scene.source[1]} × ${scene.source[0]}`;
    $("caption").textContent = scene.caption ?? "";
    draw();
  }

  function neighbour(step, from = at) {
    for (let i = from + step; i >= 0 && i < scenes.length; i += step) if (matches(i)) return i;
    return null;
  }

  function move(step) {
    const i = neighbour(step);
    if (i === null) say(step > 0 ? "This is the last scene" : "This is the first scene");
    else show(i);
  }

  function select(part) {
    const same = selected && selected.kind === part.kind && selected.k === part.k;
    selected = same ? null : part;
    draw();
  }

  function edit(part) {
    editing = part;
    if (part.kind !== "action") selected = part;
    draw();
  }

  function commit(value) { // null: keep the text before
    const { kind, k } = editing;
    editing = null;
    const clean = (text) => text.replace(/\s+/g, " ").trim();
    const text = value === null ? null : clean(value);
    if (text !== null && kind === "action") {
      change((entry) => {
        if (text && text !== clean(scene.action ?? "")) entry.action = text;
        else delete entry.action;
      });
    } else if (text !== null) {
      changePart(kind, k, (part) => {
        if (text && text !== clean(scene[kind][k][FIELD[kind]])) part[FIELD[kind]] = text;
        else delete part[FIELD[kind]];
      });
    }
  }

  function endEdit(value) {
    const { kind, k } = editing;
    commit(value);
    draw();
    if (document.activeElement === document.body) $(kind === "action" ? "part-action" : `part-${kind}-${k}`)?.focus();
  }

  function toggle(part) {
    if (!part) return say("Select an object (1 to 9) or a relation (Shift and 1 to 9) first");
    changePart(part.kind, part.k, (found) => {
      if (found.reject) delete found.reject;
      else found.reject = true;
    });
    draw();
  }

  function decide(what) {
    const before = entryOf(at).scene;
    change((entry) => {
      if (before === what) delete entry.scene;
      else entry.scene = what;
    });
    const next = before === what ? null : neighbour(1);
    if (next !== null) return show(next);
    draw();
    const open = scenes.filter((_, i) => !isDecided(i)).length;
    if (before !== what) say(open ? `Last scene; ${open} without decisions` : "All scenes have decisions: save decisions.json");
  }

  function undo() {
    const last = undone.pop();
    if (!last) return say("Nothing to undo");
    replaceEntries(last.before);
    show(last.at);
  }

  function save() {
    const url = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
    make("a", { href: url, download: "decisions.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    const others = decisions.size - scenes.filter((_, i) => isDecided(i)).length;
    say(`Saved ${countOf(decisions.size)} with decisions${others ? `; ${others} of them are not on this page` : ""}`);
  }

  async function load(file) {
    try {
      const found = parsed(await file.text());
      undone.push({ at, before: found.map(([key]) => [key, decisions.get(key)]) });
      replaceEntries(found);
      const here = new Set(scenes.map(({ key }) => key));
      const others = found.filter(([key]) => !here.has(key)).length;
      say(`Loaded ${countOf(found.length)} with decisions${others ? `; ${others} of them are not on this page, but kept` : ""}`);
      draw();
    } catch (error) {
      say(`${brief(file.name)}: ${brief(error.message)}`);
    }
  }

  const KEYS = {
    j: () => move(1),
    k: () => move(-1),
    ArrowRight: () => move(1),
    ArrowLeft: () => move(-1),
    a: () => decide("accept"),
    r: () => decide("reject"),
    x: () => toggle(selected),
    e: () => edit(selected ?? { kind: "action" }),
    u: undo,
    s: save,
    m: () => $("marks").click(),
    "?": () => $("help").showModal(),
    Escape: () => selected && select(selected),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
    const kind = event.shiftKey ? "relations" : "objects";
    if (digit && (event.shiftKey || event.key === digit[1])) {
      const k = Number(digit[1]) - 1;
      if (k < scene[kind].length) select({ kind, k });
      else say(`This scene has ${scene[kind].length} ${kind}`);
    } else {
      const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!act) return;
      act();
    }
    event.preventDefault();
  });

  document.addEventListener("pointerdown", () => (pressed = true), true);
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => (pressed = false), true);
  $("stage").addEventListener("click", (event) => {
    const { left, top, width, height } = $("stage").getBoundingClientRect();
    const x = Math.floor(((event.clientX - left) / width) * scene.size[1]);
    const y = Math.floor(((event.clientY - top) / height) * scene.size[0]);
    const k = objectAt(x, y);
    if (k !== null) select({ kind: "objects", k });
    else if (selected) select(selected);
  });
  $("previous").onclick = () => move(-1);
  $("next").onclick = () => move(1);
  $("accept").onclick = () => decide("accept");
  $("reject").onclick = () => decide("reject");
  $("undo").onclick = undo;
  $("save").onclick = save;
  $("load").onclick = () => $("file").click();
  $("ask").onclick = () => $("help").showModal();
  $("marks").onclick = () => ((marks = !marks), draw());
  $("file").onchange = () => {
    if ($("file").files.length) load($("file").files[0]);
    $("file").value = "";
  };
  $("filter").onchange = () => {
    $("filter").blur(); // so that keys act on the scene
    if (matches(at)) return draw();
    const i = neighbour(1, -1);
    if (i === null) {
      say(`No scenes are ${$("filter").selectedOptions[0].text}`);
      $("filter").value = "all";
      draw();
    } else show(i);
  };
  $("jump").onchange = () => {
    const i = Math.min(Math.max(Math.round(Number($("jump").value)) || 1, 1), scenes.length) - 1;
    $("jump").blur();
    show(i);
  };
  window.addEventListener("storage", (event) => { // another tab
    if (event.key === STORE && !editing) restore(), draw();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!stored && decisions.size) event.preventDefault();
  });

  const title = json("run");
  document.title = `Generation review: ${title}`;
  $("title").textContent = title;
  $("scenes").textContent = total > scenes.length ? `${scenes.length} (sampled from ${total})` : scenes.length;
  $("jump").max = scenes.length;
  restore();
  const first = scenes.findIndex((_, i) => !isDecided(i));
  show(Math.max(first, 0));
})();
