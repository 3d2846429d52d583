// What the browser keeps and does by itself: saved conversations, language, dark mode, export, the Enter key.
// Conversations are JSON texts made by the server (talk.py); they are stored under one key each.
(() => {
  "use strict";
  const PREFIX = "chatglm.talk.";
  const CURRENT = "chatglm.current";
  const LANGUAGE = "chatglm.language";
  const THEME = "chatglm.theme";
  const CONSENT = "chatglm.consent";
  const RATER = "chatglm.rater";
  const SETTINGS = "chatglm.settings";
  const MODEL = "chatglm.model";
  const NUMBERS = 5; // sliders; after them comes the seed, a text
  const MOST = 200;
  const SAME = { __type__: "update" };
  const UNTITLED = { en: "New conversation", zh: "新对话" };
  const FULL = {
    en: "This browser's storage is full: the conversation was not saved. Delete or export older ones.",
    zh: "浏览器存储空间已满，此对话未能保存。请删除或导出较早的对话。",
  };
  const LOST = {
    en: "The server cannot be reached. The conversation is saved and comes back with the server.",
    zh: "无法连接服务器。对话已保存，服务器恢复后会自动显示。",
  };

  const REFUSED = {
    401: { en: "The key is no longer valid. Load the page again.", zh: "密钥已失效，请重新载入页面。" },
    413: {
      en: "This conversation is too large for the server. Start a new one.",
      zh: "此对话过长，服务器无法处理。请新建对话。",
    },
    503: { en: "The server is too busy or shutting down.", zh: "服务器繁忙或正在关闭。" },
  };

  const get = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // storage is forbidden: nothing is kept, everything else works
    }
  };
  const put = (key, value) => {
    try {
      localStorage.setItem(key, value);
      return true;
    } catch {
      return false;
    }
  };
  const drop = (key) => {
    try {
      localStorage.removeItem(key);
    } catch {
      // as above
    }
  };

  const language = () => get(LANGUAGE) || (/^zh\b/i.test(navigator.language || "") ? "zh" : "en");

  const talks = () => {
    const found = [];
    try {
      for (let at = 0; at < localStorage.length; at++) {
        const key = localStorage.key(at);
        if (key && key.startsWith(PREFIX)) {
          try {
            const talk = JSON.parse(localStorage.getItem(key));
            if (talk && typeof talk.id === "string") found.push(talk);
          } catch {
            // not ours any more; left alone
          }
        }
      }
    } catch {
      // as above
    }
    return found.sort((a, b) => (b.used_at || b.created_at || 0) - (a.used_at || a.created_at || 0));
  };

  const list = (current) => {
    const lang = language();
    const choices = talks().map((talk) => [talk.title || UNTITLED[lang], talk.id]);
    const isSaved = choices.some(([, id]) => id === current);
    return { __type__: "update", choices, value: isSaved ? current : null };
  };

  const note = (text, isLost) => {
    let box = document.getElementById("page-note");
    if (!box) {
      box = document.createElement("div");
      box.id = "page-note";
      box.setAttribute("role", "alert");
      document.body.append(box);
    }
    box.textContent = text;
    box.hidden = !text;
    box.toggleAttribute("data-lost", Boolean(isLost));
  };

  const parsed = (text) => {
    try {
      return JSON.parse(text);
    } catch {
      return null;
    }
  };

  // What a reader may be typing is written here, in the moment of the action, and by no answer of the server that could
  // come later. `written` is the name that the page has put into its field last: another one there is the reader's.
  let written = "";
  const named = (title) => (written = title || "");
  const fields = (text) => {
    const talk = parsed(text);
    return [(talk && talk.system) || "", named(talk && talk.title)];
  };

  // → talk, talks, name. A name that was given while an answer was on its way is in the storage only: it is kept.
  const save = (text, name, isRenamed) => {
    const talk = parsed(text);
    if (!talk || !talk.rounds || !talk.rounds.length) return [SAME, list(talk && talk.id), SAME];
    const kept = parsed(get(PREFIX + talk.id) || "");
    const isBehind = !isRenamed && kept && kept.is_named && !(talk.is_named && talk.title === kept.title);
    if (isBehind) Object.assign(talk, { title: kept.title, is_named: true });
    const changed = isBehind ? JSON.stringify(talk) : SAME;
    talk.used_at = Date.now();
    note(put(PREFIX + talk.id, JSON.stringify(talk)) ? "" : FULL[language()]);
    for (const old of talks().slice(MOST)) drop(PREFIX + old.id);
    put(CURRENT, talk.id);
    return [changed, list(talk.id), (name || "") === written ? named(talk.title) : SAME];
  };

  // The server has taken a question: out of the box with it, but not with what was typed since.
  const asked = (text, name, box) => {
    const talk = parsed(text);
    const last = talk && talk.rounds && talk.rounds[talk.rounds.length - 1];
    const isThere = last && last.question && box.startsWith(last.question);
    return [...save(text, name), isThere ? box.slice(last.question.length) : SAME];
  };

  // A question that was taken back goes before what is in the box. → talk, talks, name, taken, box
  const undone = (text, name, taken, box) => {
    const full = taken && box.trim() ? `${taken}\n${box}` : taken || box;
    return [...save(text, name), "", full];
  };

  const rater = () => {
    let id = get(RATER);
    if (!id) {
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      id = "browser-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
      put(RATER, id);
    }
    return id;
  };

  const dark = (wanted) => {
    document.body.classList.toggle("dark", wanted);
    document.documentElement.style.colorScheme = wanted ? "dark" : "light";
  };

  const isNarrow = () => window.innerWidth < 800;
  const side = (isOpen) => ({ __type__: "update", open: isOpen }); // on a phone it covers the conversation

  // The sampling settings in the order of layout.py; unchanged where none are kept.
  const settings = () => {
    const kept = parsed(get(SETTINGS) || "");
    const isRight = Array.isArray(kept) && kept.length === NUMBERS + 1 && kept.slice(0, NUMBERS).every(Number.isFinite);
    return isRight ? kept : Array(NUMBERS + 1).fill(SAME);
  };
  const model = (served) => {
    const kept = get(MODEL);
    return (parsed(served) || []).includes(kept) ? kept : SAME;
  };
  const keepModel = (name) => put(MODEL, name);
  const keepSettings = (values) => put(SETTINGS, JSON.stringify(values.slice(0, NUMBERS + 1)));

  const start = (served) => {
    const theme = get(THEME);
    dark(theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.lang = language();
    const current = get(CURRENT);
    const text = current ? get(PREFIX + current) || "" : "";
    const first = [language(), list(text ? current : null), get(CONSENT) === "yes", rater()];
    return [...first, ...ofTalk(text), model(served), ...settings()];
  };

  const ofTalk = (text) => [text, side(!isNarrow()), ...fields(text)];

  const open = (id) => {
    put(CURRENT, id || "");
    return ofTalk((id && get(PREFIX + id)) || "");
  };

  const fresh = () => {
    drop(CURRENT);
    const box = document.querySelector("#question textarea");
    if (box) box.focus();
    return [list(null), ...ofTalk("")];
  };

  const remove = (text) => {
    const talk = parsed(text);
    const lang = language();
    const question = { en: "Delete this conversation from this browser?", zh: "从此浏览器中删除这个对话？" };
    if (!talk || !confirm(question[lang])) return [list(talk && talk.id), SAME, SAME, SAME, SAME];
    drop(PREFIX + talk.id);
    return fresh();
  };

  const rename = (text, name) => {
    const talk = parsed(text) || { rounds: [] };
    const title = (name || "").trim().slice(0, 80);
    if (!title) return [SAME, list(talk.id), SAME];
    talk.title = title;
    talk.is_named = true;
    const changed = JSON.stringify(talk);
    return [changed, save(changed, title, true)[1], named(title)];
  };

  const download = (name, kind, text) => {
    const address = URL.createObjectURL(new Blob([text], { type: kind }));
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  };

  const shown = (round) => round.variants[Math.max(0, Math.min(round.chosen, round.variants.length - 1))];

  const asMarkdown = (talk) => {
    const lang = language();
    const said = { en: ["Question", "Answer"], zh: ["问", "答"] }[lang];
    const parts = [`# ${talk.title || UNTITLED[lang]}`];
    if (talk.system) parts.push(`> ${talk.system.replace(/\n/g, "\n> ")}`);
    for (const round of talk.rounds) {
      parts.push(`## ${said[0]}`, round.question);
      const answer = shown(round);
      if (answer) parts.push(`## ${said[1]}`, answer.text);
    }
    return parts.join("\n\n") + "\n";
  };

  const exported = (text, form) => {
    const talk = parsed(text);
    if (!talk || !talk.rounds.length) return;
    const name = (talk.title || "chat").replace(/[^\p{L}\p{N}_-]+/gu, "-").slice(0, 60);
    if (form === "json") download(`${name}.json`, "application/json", JSON.stringify(talk, null, 2) + "\n");
    else download(`${name}.md`, "text/markdown", asMarkdown(talk));
  };

  const setLanguage = (lang) => {
    put(LANGUAGE, lang);
    document.documentElement.lang = lang;
    return list(get(CURRENT));
  };

  const switchDark = () => {
    const wanted = !document.body.classList.contains("dark");
    put(THEME, wanted ? "dark" : "light");
    dark(wanted);
  };

  const consent = (given) => {
    if (given) put(CONSENT, "yes");
    else drop(CONSENT);
  };

  // An input method's Enter chooses a word; it must not reach Gradio, which would send the question.
  for (const kind of ["keydown", "keypress", "keyup"]) {
    document.addEventListener(
      kind,
      (event) => {
        const isOurs = event.target instanceof Element && event.target.closest("#question");
        if (isOurs && event.key === "Enter" && (event.isComposing || event.keyCode === 229)) {
          event.stopImmediatePropagation();
        }
      },
      true,
    );
  }

  // A server that is gone is said in words of the reader. Gradio looks for it and loads the page again when it is back.
  const nativeFetch = window.fetch.bind(window);
  let failures = 0;
  window.fetch = async (...request) => {
    try {
      const response = await nativeFetch(...request);
      const isEvent = String(request[0]?.url || request[0]).includes("/queue/join");
      if (isEvent && !response.ok) {
        const said = REFUSED[response.status];
        note(said ? said[language()] : `HTTP ${response.status}`);
      } else if (failures) {
        failures = 0;
        note("");
      }
      return response;
    } catch (error) {
      if (error && error.name !== "AbortError") {
        failures += 1;
        note(LOST[language()], true);
      }
      throw error;
    }
  };

  window.chatglmPage = {
    start, save, asked, undone, keepSettings, keepModel, open, fresh, remove, rename, exported, setLanguage, switchDark,
    consent,
  };
})();
