"use strict";
/* One clock for all videos of a page: they play in step, and a frame is shown in all of them. */
class Player {
  constructor(root) {
    this.root = root;
    this.frames = Number(root.dataset.frames);
    this.fps = Number(root.dataset.fps);
    this.time = 0; // seconds
    this.rate = 1;
    this.playing = false;
    this.slider = root.querySelector(".controls input");
    this.output = root.querySelector(".controls output");
    this.canvas = root.querySelector("canvas[data-difference]");
    this.slider.max = this.frames - 1;
    const act = { play: () => this.toggle(), back: () => this.step(-1), forward: () => this.step(1) };
    for (const button of root.querySelectorAll("[data-do]")) button.addEventListener("click", act[button.dataset.do]);
    this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
    root.querySelector(".controls select").addEventListener("change", (event) => { this.rate = Number(event.target.value); });
    document.addEventListener("keydown", (event) => this.key(event));
    for (const video of root.querySelectorAll("video")) this.add(video);
    this.label();
  }

  add(video) {
    video.controls = false;
    video.addEventListener("loadedmetadata", () => {
      if (!this.fps) this.fps = this.frames / video.duration; // of a run by an earlier version
      this.root.style.setProperty("--aspect", `${video.videoWidth}/${video.videoHeight}`);
      if (video.videoWidth <= 160) this.root.classList.add("pixels");
      this.seek(video);
    });
    video.addEventListener("seeked", () => this.difference());
    video.addEventListener("loadeddata", () => this.difference());
    video.addEventListener("error", () => {
      if (!video.getAttribute("src")) return;
      const note = document.createElement("div");
      note.className = "missing";
      note.style.aspectRatio = video.style.aspectRatio;
      note.textContent = "this video cannot be played";
      video.replaceWith(note);
    });
    if (video.readyState >= 1) this.seek(video);
  }

  get frame() { return Math.min(this.frames - 1, Math.floor(this.time * (this.fps || 1) + 1e-6)); }
  videos() { return [...this.root.querySelectorAll("video")].filter((video) => video.readyState >= 1 && video.offsetParent); }

  /* The middle of the frame, or of the last one in a shorter video. */
  seek(video) {
    const half = 0.5 / (this.fps || 1);
    const time = Math.max(0, Math.min((this.frame + 0.5) / (this.fps || 1), video.duration - half));
    if (Math.abs(video.currentTime - time) > 1e-3) video.currentTime = time; // again to the last frame would end it
  }

  show(frame) {
    this.pause();
    this.time = Math.max(0, Math.min(frame, this.frames - 1)) / (this.fps || 1);
    for (const video of this.videos()) this.seek(video);
    this.label();
  }

  step(by) { this.show(this.frame + by); }
  toggle() { if (this.playing) this.show(this.frame); else this.play(); }

  play() {
    this.playing = true;
    this.root.classList.add("playing");
    this.last = performance.now();
    requestAnimationFrame((now) => this.tick(now));
  }

  pause() {
    this.playing = false;
    this.root.classList.remove("playing");
    for (const video of this.root.querySelectorAll("video")) video.pause();
  }

  tick(now) {
    if (!this.playing) return;
    this.time += Math.min(0.25, (now - this.last) / 1000) * this.rate;
    this.last = now;
    const length = this.frames / (this.fps || 1);
    if (this.time > length + 0.8 * this.rate) this.time = 0; // the last frame stays for a moment
    for (const video of this.videos()) {
      const end = video.duration - 0.5 / (this.fps || 1);
      if (this.time >= end) { video.pause(); if (Math.abs(video.currentTime - end) > 0.02 && !video.seeking) video.currentTime = end; continue; }
      if (Math.abs(video.currentTime - this.time) > 0.2 && !video.seeking) video.currentTime = this.time;
      video.playbackRate = this.rate;
      if (video.paused) video.play().catch(() => {});
    }
    this.label();
    this.difference();
    requestAnimationFrame((next) => this.tick(next));
  }

  label() {
    this.slider.value = this.frame;
    this.output.textContent = `frame ${this.frame + 1} of ${this.frames}`;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target, typing = target.matches("select, textarea, input:not([type=range])");
    if (typing || (event.key === " " && target.matches("button, summary, a"))) return;
    const act = { " ": () => this.toggle(), ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      Home: () => this.show(0), End: () => this.show(this.frames - 1) }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  /* The final video in grey, and in colour what differs from the first one. */
  difference() {
    const [before, after] = ["before", "after"].map((name) => this.root.querySelector(`video[data-name=${name}]`));
    if (!this.canvas || !before || !after || before.readyState < 2 || after.readyState < 2) return;
    const scale = Math.min(1, 480 / after.videoWidth), width = Math.round(after.videoWidth * scale), height = Math.round(after.videoHeight * scale);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    const pixels = (video) => { context.drawImage(video, 0, 0, width, height); return context.getImageData(0, 0, width, height); };
    const one = pixels(before).data, result = pixels(after), two = result.data;
    const [base, share] = matchMedia("(prefers-color-scheme: dark)").matches ? [28, 0.3] : [150, 0.4];
    for (let i = 0; i < two.length; i += 4) {
      const change = Math.max(Math.abs(one[i] - two[i]), Math.abs(one[i + 1] - two[i + 1]), Math.abs(one[i + 2] - two[i + 2]));
      const strength = Math.min(1, Math.max(0, change - 12) / 70);
      const grey = base + share * (0.3 * two[i] + 0.59 * two[i + 1] + 0.11 * two[i + 2]);
      two[i] = grey + strength * (240 - grey);
      two[i + 1] = grey + strength * (50 - grey);
      two[i + 2] = grey + strength * (110 - grey);
    }
    context.putImageData(result, 0, 0);
  }
}

/* A browser plays some hundred videos at most: only those near the screen have a source. */
function load(videos) {
  const observer = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      if (isIntersecting) target.src = target.dataset.src;
      else if (target.hasAttribute("src")) { target.removeAttribute("src"); target.load(); }
    }
  }, { rootMargin: "600px" });
  for (const video of videos) observer.observe(video);
}

/* The instances of a gallery by family and outcome, in the chosen order. */
function filters() {
  const list = document.getElementById("entries");
  if (!list) return;
  const [family, outcome, order] = ["family", "outcome", "order"].map((id) => document.getElementById(id));
  const entries = [...list.children];
  const apply = () => {
    const sign = Number(order.value);
    list.append(...(sign ? [...entries].sort((a, b) => sign * (a.dataset.gain - b.dataset.gain)) : entries));
    for (const entry of entries) {
      entry.hidden = Boolean((family.value && entry.dataset.family !== family.value) || (outcome.value && entry.dataset.outcome !== outcome.value));
    }
    const shown = entries.filter((entry) => !entry.hidden).length;
    document.getElementById("count").textContent = `${shown} of ${entries.length} shown`;
  };
  for (const select of [family, outcome, order]) select.addEventListener("change", apply);
  apply();
}

for (const root of document.querySelectorAll("[data-player]")) {
  const player = new Player(root);
  root.player = player;
  load(root.querySelectorAll("video[data-src]"));
  filters();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.play();
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "copied"; } catch { button.textContent = "selected"; }
  });
}
