globalThis.chatglmPage = { save: () => [] };
