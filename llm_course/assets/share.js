"use strict";
// A GPT in one file. Nothing is fetched, nothing is sent, nothing is stored: it reads the bytes that
// `pack_model` wrote, and computes one position at a time. `write_share` puts it into the page.

// --- The file -------------------------------------------------------------------------------------

async function unpack(text) {
  "Base64 of deflated bytes -> what is said about the model, and its tensors by name.";
  const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const size = new DataView(bytes).getUint32(0, true), begin = 4 + size;
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, size)));
  const tensors = {};
  for (const [name, { shape, floats, ints }] of Object.entries(about.tensors)) {
    const rows = shape[0], cols = shape[1] ?? 1;
    const tensor = { rows, cols };
    if (ints === undefined) tensor.floats = new Float32Array(bytes, begin + floats, rows * cols);
    else {
      tensor.scales = new Float32Array(bytes, begin + floats, rows);
      tensor.ints = new Int8Array(bytes, begin + ints, rows * cols);
    }
    tensors[name] = tensor;
  }
  return { about, tensors };
}

// --- The model ------------------------------------------------------------------------------------

function times(matrix, x, out, bias) {
  "out = matrix · x + bias; the whole numbers of a row are summed first and scaled once.";
  const { ints, scales, rows, cols } = matrix;
  for (let row = 0, at = 0; row < rows; row++) {
    let a = 0, b = 0, c = 0, d = 0, k = 0;
    for (; k + 3 < cols; k += 4, at += 4) {
      a += ints[at] * x[k];
      b += ints[at + 1] * x[k + 1];
      c += ints[at + 2] * x[k + 2];
      d += ints[at + 3] * x[k + 3];
    }
    for (; k < cols; k++, at++) a += ints[at] * x[k];
    out[row] = (a + b + (c + d)) * scales[row] + (bias ? bias.floats[row] : 0);
  }
}

function erf(x) {
  "Numerical Recipes' Chebyshev fit of the error function, right to 1.2e-7.";
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const p = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
    0.37409196, 1.00002368, -1.26551223].reduce((sum, c) => sum * t + c);
  return Math.sign(x) * (1 - t * Math.exp(p - x * x));
}

const BEND = {
  gelu: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  "gelu-erf": (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  relu2: (x) => (x > 0 ? x * x : 0),
  swiglu: (x) => x / (1 + Math.exp(-x)),
};

function normalise(x, from, size, eps, layer, weight, bias) {
  "Bring `size` numbers to length sqrt(size), in place; layer norm takes their mean away first.";
  let mean = 0, square = 0;
  if (layer) {
    for (let i = 0; i < size; i++) mean += x[from + i];
    mean /= size;
  }
  for (let i = 0; i < size; i++) square += (x[from + i] - mean) ** 2;
  const scale = 1 / Math.sqrt(square / size + eps);
  for (let i = 0; i < size; i++) {
    const y = (x[from + i] - mean) * scale * (weight ? weight.floats[i] : 1);
    x[from + i] = y + (bias ? bias.floats[i] : 0);
  }
}

class Model {
  "Reads token after token, and remembers all that it computed: keys, values, queries, streams.";
  constructor(config, tensors) {
    const { d_model: C, n_layers: L, n_heads: H, context_length: T, vocab_size: V } = config;
    const G = config.n_kv_heads ?? H, D = C / H;
    Object.assign(this, { config, style: config.style, C, L, H, G, D, T, V, ids: [], tensors });
    const floats = (n) => new Float32Array(n), shift = config.style.shift;
    this.memory = Array.from({ length: L }, () => ({
      keys: floats(T * G * D), values: floats(T * G * D), queries: floats(T * C),
      read: [floats(shift ? T * C : 0), floats(shift ? T * C : 0)],
    }));
    this.last = floats(T * C);
    const hidden = tensors["blocks.0.feed_forward.up.weight"].rows;
    this.scratch = { x: floats(C), h: floats(C), q: floats(C), k: floats(G * D), v: floats(G * D),
      seen: floats(C), y: floats(C), wide: floats(hidden), gate: floats(hidden) };
    this.scores = new Float64Array(T);
  }

  norm(name, x) {
    const { norm, norm_eps } = this.style, of = (part) => this.tensors[`${name}.${part}`];
    normalise(x, 0, this.C, norm_eps, norm.startsWith("layer"), of("weight"), of("bias"));
  }

  linear(name, x, out) {
    times(this.tensors[`${name}.weight`], x, out, this.tensors[`${name}.bias`]);
  }

  shift(memory, branch, h, t) {
    "The second half of what a layer reads comes from the position before.";
    if (!this.style.shift) return;
    const { C } = this, half = Math.ceil(C / 2), kept = memory.read[branch];
    kept.set(h, t * C);
    for (let i = half; i < C; i++) h[i] = t ? kept[(t - 1) * C + i] : 0;
  }

  turn(x, heads, t) {
    "Rotate each pair (x[i], x[i + D/2]) by its angle; before it, one length for all, if asked.";
    const { D, style } = this, { speeds, gain } = this.config, half = D / 2;
    for (let head = 0; head < heads; head++) {
      if (style.qk_norm) normalise(x, head * D, D, 1.1920928955078125e-7, false);
      if (style.position !== "rope") continue;
      for (let i = 0, at = head * D; i < half; i++, at++) {
        const cos = gain * Math.cos(t * speeds[i]), sin = gain * Math.sin(t * speeds[i]);
        const left = x[at], right = x[at + half];
        x[at] = left * cos - right * sin;
        x[at + half] = right * cos + left * sin;
      }
    }
  }

  look(memory, head, t) {
    "How much position t takes from each position up to itself; returns the first that it sees.";
    const { D, G, H, C, scores } = this, window = this.config.window ?? t + 1;
    const first = Math.max(0, t + 1 - window), width = G * D;
    const group = Math.floor(head / (H / G)) * D, ask = t * C + head * D;
    let most = -Infinity, sum = 0;
    for (let s = first; s <= t; s++) {
      let score = 0;
      const at = s * width + group;
      for (let i = 0; i < D; i++) score += memory.queries[ask + i] * memory.keys[at + i];
      scores[s] = score / Math.sqrt(D);
      if (scores[s] > most) most = scores[s];
    }
    for (let s = first; s <= t; s++) sum += scores[s] = Math.exp(scores[s] - most);
    for (let s = first; s <= t; s++) scores[s] /= sum;
    return first;
  }

  attend(name, memory, t) {
    const { D, G, H, C, scores } = this, { h, q, k, v, seen, y } = this.scratch;
    this.linear(`${name}.query`, h, q);
    this.linear(`${name}.key`, h, k);
    this.linear(`${name}.value`, h, v);
    this.turn(q, H, t);
    this.turn(k, G, t);
    memory.queries.set(q, t * C);
    memory.keys.set(k, t * G * D);
    memory.values.set(v, t * G * D);
    seen.fill(0);
    for (let head = 0; head < H; head++) {
      const first = this.look(memory, head, t), group = Math.floor(head / (H / G)) * D;
      for (let s = first; s <= t; s++) {
        const share = scores[s], at = s * G * D + group;
        for (let i = 0; i < D; i++) seen[head * D + i] += share * memory.values[at + i];
      }
    }
    this.linear(`${name}.out`, seen, y);
  }

  feed(name) {
    const { h, y, wide, gate } = this.scratch, bend = BEND[this.style.activation];
    this.linear(`${name}.up`, h, wide);
    if (this.style.activation === "swiglu") {
      this.linear(`${name}.gate`, h, gate);
      for (let i = 0; i < wide.length; i++) wide[i] *= bend(gate[i]);
    } else for (let i = 0; i < wide.length; i++) wide[i] = bend(wide[i]);
    this.linear(`${name}.down`, wide, y);
  }

  read(id) {
    "One token more; its last hidden state is kept.";
    const { C, L, tensors } = this, { x, h, y } = this.scratch, t = this.ids.length;
    if (t >= this.T) throw new Error(`the model reads ${this.T} tokens at once`);
    const { ints, scales } = tensors["embed.weight"], place = tensors["position.weight"];
    for (let i = 0; i < C; i++) {
      x[i] = ints[id * C + i] * scales[id] + (place ? place.floats[t * C + i] : 0);
    }
    for (let layer = 0; layer < L; layer++) {
      const memory = this.memory[layer], name = `blocks.${layer}`;
      h.set(x);
      this.norm(`${name}.norm1`, h);
      this.shift(memory, 0, h, t);
      this.attend(`${name}.attention`, memory, t);
      for (let i = 0; i < C; i++) x[i] += y[i];
      h.set(x);
      this.norm(`${name}.norm2`, h);
      this.shift(memory, 1, h, t);
      this.feed(`${name}.feed_forward`);
      for (let i = 0; i < C; i++) x[i] += y[i];
    }
    this.norm("norm", x);
    this.last.set(x, t * C);
    this.ids.push(id);
  }

  readAll(ids) {
    "Go on from the longest beginning that was read already.";
    let same = 0;
    while (same < ids.length && same < this.ids.length && ids[same] === this.ids[same]) same++;
    this.ids.length = Math.min(same, ids.length - 1);
    for (const id of ids.slice(this.ids.length)) this.read(id);
  }

  logits(t = this.ids.length - 1) {
    "What may follow position t.";
    const head = this.tensors["head.weight"] ?? this.tensors["embed.weight"];
    const out = new Float32Array(this.V);
    times(head, this.last.subarray(t * this.C, (t + 1) * this.C), out);
    return out;
  }

  attention(layer, head, t) {
    "Shares that sum to one, for positions 0 to t.";
    const first = this.look(this.memory[layer], head, t);
    return this.scores.slice(0, t + 1).fill(0, 0, first);
  }
}

function softmax(logits, temperature) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const probs = Float64Array.from(logits, (x) => Math.exp((x - most) / temperature));
  const sum = probs.reduce((a, b) => a + b, 0);
  return probs.map((p) => p / sum);
}

function draw(logits, temperature, random = Math.random) {
  "The likeliest at temperature 0, of equals the first; else by chance.";
  if (temperature === 0) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b), -Infinity));
  const probs = softmax(logits, temperature);
  let left = random();
  for (let id = 0; id < probs.length; id++) if ((left -= probs[id]) < 0) return id;
  return probs.reduce((best, p, id) => (p > probs[best] ? id : best), 0);
}

// --- The tokenizer --------------------------------------------------------------------------------

class Tokenizer {
  "Characters, words, bytes or byte pairs. A token is a string of its bytes, a letter per byte.";
  constructor({ kind, tokens, special, pattern, young, merges, form }) {
    Object.assign(this, { kind, tokens, special, form });
    const exact = (name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const longest = Object.keys(special).sort((a, b) => b.length - a.length);
    this.marks = new RegExp(`(${longest.map(exact).join("|") || "(?!)"})`, "u");
    this.pieces = new RegExp(pattern, "gu");
    this.young = new RegExp(young, "gu");
    this.ranks = new Map(tokens.flatMap((token, id) => (token === null ? [] : [[token, id]])));
    this.order = new Map((merges ?? []).map(([a, b, joint], i) => [`${a},${b}`, [i, joint]]));
    this.names = new Map(Object.entries(special).map(([name, id]) => [id, name]));
    this.known = new Map();
  }

  static bytes(text) {
    return Array.from(new TextEncoder().encode(text), (b) => String.fromCharCode(b));
  }

  split(text) {
    "Pieces; letters younger than Unicode 16 count as signs, as they do in Python.";
    const frozen = text.replace(this.young, "\uffff");
    if (frozen === text) return text.match(this.pieces) ?? [];
    const letters = [...text];
    let at = 0;
    return (frozen.match(this.pieces) ?? []).map((piece) => {
      const n = [...piece].length;
      at += n;
      return letters.slice(at - n, at).join("");
    });
  }

  merge(parts, rank, join) {
    "Join the neighbours of lowest rank, the leftmost first, until no pair has one.";
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = rank(parts[i], parts[i + 1]);
        if (found !== undefined && found < best) [best, at] = [found, i];
      }
      if (at < 0) return parts;
      parts.splice(at, 2, join(parts[at], parts[at + 1]));
    }
  }

  pieceIds(piece) {
    const parts = Tokenizer.bytes(piece), whole = parts.join(""), id = this.ranks.get(whole);
    const one = (token) => this.ranks.get(token);
    if (this.kind === "byte") return parts.map(one);
    if (this.kind === "merges") {
      const known = parts.map(one).filter((byte) => byte !== undefined);
      return this.merge(known, (a, b) => this.order.get(`${a},${b}`)?.[0],
        (a, b) => this.order.get(`${a},${b}`)[1]);
    }
    if (id !== undefined) return [id];
    if (this.kind === "word") return [this.special["<unk>"]];
    if (this.kind === "char") throw new Error(`it does not know the character “${piece}”`);
    return this.merge(parts, (a, b) => this.ranks.get(a + b), (a, b) => a + b).map(one);
  }

  encode(text) {
    "Ids; names of special tokens in it are ordinary text.";
    const ids = [];
    for (const piece of this.split(text.replace(/\p{Cs}/gu, "\ufffd"))) {
      if (!this.known.has(piece)) this.known.set(piece, this.pieceIds(piece));
      ids.push(...this.known.get(piece));
    }
    return ids;
  }

  obey(text) {
    "Ids; names of special tokens in it are these.";
    return text.split(this.marks).flatMap((part, i) =>
      (i % 2 ? [this.special[part]] : this.encode(part)));
  }

  token(id) {
    "The bytes of a token.";
    const text = this.tokens[id] ?? null;
    if (text !== null) return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    return new TextEncoder().encode(this.names.get(id) ?? "");
  }

  decode(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return ids.map((id) => decoder.decode(this.token(id), { stream: true })).join("")
      + decoder.decode();
  }

  show(id) {
    "For people.";
    const name = this.names.get(id);
    if (name) return `⟨${name.replace(/^<\|?|\|?>$/g, "")}⟩`;
    return this.decode([id]).replace(/\n/g, "↵").replace(/\t/g, "⇥");
  }
}

// --- Writing --------------------------------------------------------------------------------------

class Writer {
  "A model with its tokenizer: prompts in, tokens out.";
  constructor({ about, tensors }) {
    this.about = about;
    this.model = new Model(about.config, tensors);
    this.tokenizer = new Tokenizer(about.tokenizer);
    this.end = this.tokenizer.special["<|endoftext|>"];
    this.chats = about.stage !== "base";
    const special = Object.values(this.tokenizer.special);
    this.stops = new Set(this.chats ? special : this.end === undefined ? [] : [this.end]);
  }

  render(messages) {
    "A conversation as ids, ready for an answer.";
    const { special, form } = this.tokenizer;
    if (form) return this.renderForm(messages, form);
    return [this.end, ...messages.flatMap(({ role, content }) =>
      [special[`<|${role}|>`], ...this.tokenizer.encode(" " + content), special["<|end|>"]]),
    special["<|assistant|>"]];
  }

  renderForm(messages, form) {
    "The same in the form of a model from elsewhere; special tokens in what people say stay text.";
    const { tokenizer } = this, last = messages.length - 1;
    const after = messages.map(({ role }, i) =>
      (i === last ? form.reply : role === "user" ? form.answer : form.next));
    if (!messages.some(({ content }) => tokenizer.marks.test(content))) {
      return tokenizer.obey(form.first + messages.map(({ content }, i) => content + after[i]).join(""));
    }
    return [...tokenizer.obey(form.first), ...messages.flatMap(({ content }, i) =>
      [...tokenizer.encode(content), ...tokenizer.obey(after[i])])];
  }

  chatPrompt(messages, most) {
    "As many of the last messages as leave room for an answer; the first of them is a user's.";
    const { T } = this.model, room = T - Math.min(most, Math.floor(T / 3));
    if (messages.at(-1).content.length > 64 * T) throw new Error("this is too long for the model");
    for (let start = 0; start < messages.length; start++) {
      if (messages[start].role !== "user") continue;
      const ids = this.render(messages.slice(start));
      if (ids.length <= room) return ids;
    }
    throw new Error(`this is too long: with an answer it has to fit into ${T} tokens`);
  }

  textPrompt(text) {
    "The beginning of a text as ids, the last ones that fit.";
    const bare = text.replace(/ +$/, "").slice(-64 * this.model.T);
    const ids = [...(this.about.documents ? [this.end] : []), ...this.tokenizer.encode(bare)];
    return (ids.length ? ids : this.tokenizer.encode("\n")).slice(-this.model.T);
  }

  *tokens(prompt, most, temperature = () => 0) {
    "New ids, one by one; with the context full, the older half is forgotten.";
    const { model } = this;
    model.readAll(prompt);
    let text = prompt;
    for (let n = 0; n < most; n++) {
      if (n) {
        if (model.ids.length < model.T) model.read(text.at(-1));
        else model.readAll(text = text.slice(-Math.max(1, Math.floor(model.T / 2))));
      }
      const id = draw(model.logits(), temperature());
      if (this.stops.has(id)) return;
      text = [...text, id];
      yield id;
    }
  }

  greedy(prompt, most) {
    return [...this.tokens(prompt, most)];
  }
}

// --- The page -------------------------------------------------------------------------------------

const at = (id) => document.getElementById(id);

function made(tag, text = "", more = {}) {
  const part = Object.assign(document.createElement(tag), more);
  part.textContent = text;
  return part;
}

const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(100 * p).toFixed(0)} %`
  : `${(100 * p).toFixed(1)} %`);

class Page {
  "The chat on the left, what the model saw on the right.";
  constructor(writer) {
    Object.assign(this, { writer, messages: [], story: "", busy: false, chosen: 0 });
    const { L, H } = writer.model;
    for (let i = 0; i < L; i++) at("layer").append(made("option", `layer ${i + 1}`, { value: i }));
    at("layer").value = L - 1;
    for (let i = 0; i < H; i++) at("head").append(made("option", `head ${i + 1}`, { value: i }));
    for (const example of writer.about.examples) this.addExample(example);
    at("say").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    at("words").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    at("stop").addEventListener("click", () => { this.busy = false; });
    at("anew").addEventListener("click", () => this.anew());
    at("heat").addEventListener("input", () => { this.showHeat(); this.inspect(); });
    at("layer").addEventListener("change", () => this.inspect());
    at("head").addEventListener("change", () => this.inspect());
    at("place").addEventListener("input", () => this.choose(Number(at("place").value)));
    at("strip").addEventListener("click", ({ target }) => {
      if (target.dataset.at) this.choose(Number(target.dataset.at));
    });
    at("map").addEventListener("click", (event) => this.chooseOnMap(event));
    at("words").disabled = at("send").disabled = at("anew").disabled = false;
    this.showHeat();
    this.tell("Ready.");
  }

  addExample(text) {
    const button = made("button", text, { type: "button" });
    button.addEventListener("click", () => { at("words").value = text; this.send(); });
    at("examples").append(button);
  }

  get heat() {
    return Number(at("heat").value);
  }

  showHeat() {
    const word = this.heat === 0 ? "always the likeliest" : this.heat < 0.7 ? "careful"
      : this.heat <= 1 ? "its own odds, nearly" : "daring";
    at("heat-said").textContent = `${this.heat.toFixed(1)}, ${word}`;
    at("heat").setAttribute("aria-valuetext", at("heat-said").textContent);
  }

  tell(text) {
    at("status").textContent = text;
  }

  anew() {
    this.busy = false;
    this.messages = [];
    this.story = "";
    at("log").replaceChildren();
    at("words").focus();
    this.tell("Forgotten.");
  }

  bubble(who, text) {
    const box = made("article", "", { className: who });
    const words = made("p", text);
    box.append(made("h3", who === "user" ? "You" : this.writer.about.name), words);
    at("log").append(box);
    return words;
  }

  prompt(text) {
    "What the model is to read, and where its answer is shown.";
    const { writer } = this, most = Number(at("most").value);
    if (writer.chats) {
      const messages = [...this.messages, { role: "user", content: text }];
      const ids = writer.chatPrompt(messages, most);
      this.bubble("user", text);
      return [ids, this.bubble("assistant", ""), messages];
    }
    const whole = writer.about.documents ? text : this.story + text, ids = writer.textPrompt(whole);
    const shown = this.bubble("assistant", "");
    shown.append(made("b", text));
    return [ids, shown, whole];
  }

  async send() {
    const text = at("words").value.trim();
    if (this.busy || (this.writer.chats && !text)) return;
    try {
      await this.answer(...this.prompt(text));
    } catch (error) {
      this.tell(`Sorry: ${error.message}.`);
    }
    this.busy = false;
    at("stop").disabled = true;
  }

  async answer(ids, shown, before) {
    "Write, and let the page live meanwhile.";
    const { writer } = this, { tokenizer } = writer, most = Number(at("most").value);
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true }), tail = made("span");
    let said = "", count = 0, spent = 0, begin = performance.now(), first = 0;
    const show = (piece) => {
      said += said || !writer.chats ? piece : piece.replace(/^ /, "");
      tail.textContent = said;
    };
    shown.append(tail);
    at("words").value = "";
    this.busy = true;
    at("stop").disabled = false;
    this.tell("Writing …");
    for (const id of writer.tokens(ids, most, () => this.heat)) {
      show(decoder.decode(tokenizer.token(id), { stream: true }));
      count += 1;
      if (count === 1) first = performance.now() - begin;
      if (performance.now() - begin > 12) {
        spent += performance.now() - begin;
        at("log").scrollTop = at("log").scrollHeight;
        await new Promise((resolve) => setTimeout(resolve));
        begin = performance.now();
      }
      if (!this.busy) break;
    }
    show(decoder.decode());
    spent += performance.now() - begin;
    const rate = count > 1 ? `, ${Math.round(1000 * (count - 1) / (spent - first))} a second` : "";
    this.busy = false;
    this.keep(before, said);
    at("log").scrollTop = at("log").scrollHeight;
    this.showTokens();
    at("spoken").textContent = said;
    this.tell(`${count} tokens${rate}.`);
  }

  keep(before, said) {
    if (this.writer.chats) this.messages = [...before, { role: "assistant", content: said }];
    else this.story = before + said;
  }

  // What the model saw

  showTokens() {
    const { model, tokenizer } = this.writer;
    at("strip").replaceChildren(...model.ids.map((id, i) => {
      const part = made("span", tokenizer.show(id));
      part.dataset.at = i;
      return part;
    }));
    at("place").max = model.ids.length - 1;
    at("inside").hidden = false;
    this.choose(model.ids.length - 1);
  }

  choose(t) {
    this.chosen = t;
    at("place").value = t;
    this.inspect();
  }

  inspect() {
    const { model, tokenizer } = this.writer, t = this.chosen;
    if (this.busy || !model.ids.length || t >= model.ids.length) return;
    const word = tokenizer.show(model.ids[t]);
    const where = `token ${t + 1} of ${model.ids.length}: “${word}”`;
    at("place").setAttribute("aria-valuetext", where);
    at("place-said").textContent = where;
    this.showBars(t);
    this.showAttention(t);
  }

  showBars(t) {
    "The likeliest next tokens at the temperature that is set, and the one that came.";
    const { model, tokenizer } = this.writer, came = model.ids[t + 1];
    const heat = this.heat || 1e-3, probs = softmax(model.logits(t), heat);
    const best = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]).slice(0, 8);
    if (came !== undefined && !best.includes(came)) best.splice(-1, 1, came);
    at("bars").replaceChildren(...best.map((id) => {
      const row = made("li", "", { className: id === came ? "came" : "" });
      const bar = made("i");
      bar.style.width = `${100 * probs[id]}%`;
      row.append(made("span", tokenizer.show(id)), bar, made("b", percent(probs[id])));
      if (id === came) row.append(made("em", "came next"));
      return row;
    }));
  }

  looks(t) {
    "Attention of position t: of one head, or of all heads of the layer on average.";
    const { model } = this.writer, layer = Number(at("layer").value), head = at("head").value;
    if (head !== "") return model.attention(layer, Number(head), t);
    const sum = new Float64Array(t + 1);
    for (let i = 0; i < model.H; i++) {
      model.attention(layer, i, t).forEach((share, s) => { sum[s] += share / model.H; });
    }
    return sum;
  }

  showAttention(t) {
    const { model, tokenizer } = this.writer, shares = this.looks(t);
    [...at("strip").children].forEach((part, s) => {
      part.style.setProperty("--share", s <= t ? Math.sqrt(shares[s]) : 0);
      part.className = s === t ? "chosen" : s > t ? "later" : "";
    });
    const strip = at("strip"), now = strip.children[t];
    strip.scrollTop = now.offsetTop - strip.offsetTop - strip.clientHeight / 2;
    const best = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, 5);
    at("looks").textContent = "It looks at " + best.filter((s) => shares[s] >= 0.005)
      .map((s) => `“${tokenizer.show(model.ids[s]).trim()}” ${percent(shares[s])}`).join(", ") + ".";
    this.drawMap(t);
  }

  drawMap(t) {
    "A row for each token that looks, a column for each that is looked at; dark is much.";
    const { model } = this.writer, n = model.ids.length, canvas = at("map");
    const cell = Math.max(1, Math.floor(384 / n)), context = canvas.getContext("2d");
    canvas.width = canvas.height = cell * n;
    const colour = getComputedStyle(canvas).getPropertyValue("--hot");
    for (let row = 0; row < n; row++) {
      const shares = this.looks(row);
      for (let s = 0; s <= row; s++) {
        context.globalAlpha = Math.sqrt(shares[s]);
        context.fillStyle = colour;
        context.fillRect(s * cell, row * cell, cell, cell);
      }
    }
    context.globalAlpha = 1;
    context.strokeStyle = colour;
    context.strokeRect(0.5, t * cell + 0.5, (t + 1) * cell - 1, Math.max(1, cell - 1));
  }

  chooseOnMap(event) {
    const n = this.writer.model.ids.length, box = at("map").getBoundingClientRect();
    this.choose(Math.min(n - 1, Math.floor(n * (event.clientY - box.top) / box.height)));
  }
}

const share = { Model, Tokenizer, Writer, unpack, times, softmax, draw, erf };

share.ready = (async () => {
  try {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser is too old; one of 2023 or later is needed");
    }
    share.writer = new Writer(await unpack(at("model").textContent));
    share.page = new Page(share.writer);
  } catch (error) {
    at("status").textContent = `The model can't be read: ${error.message}.`;
    throw error;
  }
})();
