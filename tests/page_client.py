"""The chat page without a browser: Gradio's own protocol over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from server_process import ServerProcess


class PageClient:
    """One open page. `values` holds the components by elem_id, as a browser would; events change them."""

    def __init__(self, server: ServerProcess, path: str = "/chat", session: str = "abc123", **headers: str) -> None:
        self.client = httpx.Client(base_url=server.url + path, headers=headers, timeout=120)
        self.session = session
        config = self.client.get("/config")
        config.raise_for_status()
        self.config = config.json()
        parts = {part["id"]: part["props"] for part in self.config["components"]}
        self.names = {number: props.get("elem_id") for number, props in parts.items()}
        self.values: dict[str, Any] = {
            props["elem_id"]: props.get("value") for props in parts.values() if props.get("elem_id")
        }
        self.props = {props["elem_id"]: props for props in parts.values() if props.get("elem_id")}
        self.values |= {"language": "en", "rater": "browser-0123", "consent": False}

    def event(self, name: str, kind: str) -> dict[str, Any]:
        """The first server event of a component, by its trigger."""
        for dependency in self.config["dependencies"]:
            targets = [(self.names.get(target), trigger) for target, trigger in dependency["targets"]]
            if (name, kind) in targets and dependency["backend_fn"]:
                return dependency
        raise AssertionError(f"{name} has no event {kind}")

    def start(self, name: str, kind: str = "click", data: Any = None) -> dict[str, Any]:
        """Join the queue; the event."""
        event = self.event(name, kind)
        self._join(event, data)
        return event

    def _join(self, event: dict[str, Any], data: Any = None) -> None:
        body = {
            "data": [self.values.get(self.names[number] or "") for number in event["inputs"]],
            "event_data": data,
            "fn_index": event["id"],
            "trigger_id": event["targets"][0][0] if event["targets"] else None,
            "session_hash": self.session,
        }
        response = self.client.post("/gradio_api/queue/join", json=body)
        assert response.status_code == 200, response.text

    def begin(self, question: str) -> None:
        """Put a question; its answer begins and is not waited for."""
        self.values["question"] = question
        event = self.event("send", "click")
        self._join(event)
        for message in self.follow():
            if message["msg"] == "process_completed":
                self.take(event, message["output"]["data"])
        self.start("regenerate")  # what follows a question is what regenerates an answer

    def follow(self) -> Iterator[dict[str, Any]]:
        """Messages of this session until its events are complete."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line.removeprefix("data: "))
                    if message["msg"] == "close_stream":
                        return
                    yield message

    def press(
        self, name: str, kind: str = "click", data: Any = None, meanwhile: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """An event and those that follow it; `values` are as the browser would have them after it.

        meanwhile: what the reader does each time that a piece of an answer has come.
        """
        return self.run(self.event(name, kind), data, meanwhile)

    def run(
        self, event: dict[str, Any], data: Any = None, meanwhile: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        self._join(event, data)
        messages = list(self.follow())
        last: list[Any] = []
        for message in messages:
            if message["msg"] in ("process_generating", "process_completed"):
                assert message["success"], message
                given = message["output"].get("data") or []
                is_diff = message["msg"] == "process_generating" and last
                last = [apply(old, new) for old, new in zip(last, given, strict=True)] if is_diff else given or last
                self.take(event, last)
                if message["msg"] == "process_generating":
                    meanwhile()
        for following in self._after(event["id"]):
            if following["outputs"] and "talk" in [self.names.get(number) for number in following["outputs"]]:
                messages += self.run(following, meanwhile=meanwhile)
        return messages

    def _after(self, number: int) -> Iterator[dict[str, Any]]:
        """Server events that follow an event, past those that only the browser runs."""
        for dependency in self.config["dependencies"]:
            if dependency["trigger_after"] == number:
                if dependency["backend_fn"]:
                    yield dependency
                else:
                    yield from self._after(dependency["id"])

    def take(self, event: dict[str, Any], given: list[Any]) -> None:
        for number, value in zip(event["outputs"], given, strict=False):
            name = self.names.get(number)
            if isinstance(value, dict) and value.get("__type__") == "update":
                if name and "value" in value:
                    self.values[name] = value["value"]
            elif name:
                self.values[name] = value

    def ask(self, question: str) -> str:
        """A question's answer."""
        self.values["question"] = question
        self.press("send")
        return self.answers[-1]

    @property
    def talk(self) -> dict[str, Any]:
        return json.loads(self.values["talk"])

    @property
    def answers(self) -> list[str]:
        return [round["variants"][round["chosen"]]["text"] for round in self.talk["rounds"]]

    def close(self) -> None:
        self.client.close()


def apply(old: Any, changes: Any) -> Any:
    """Gradio's differences: [action, path, value], …"""
    if not isinstance(changes, list) or not all(isinstance(c, list) and len(c) == 3 for c in changes):
        return changes
    for action, path, value in changes:
        if not path:
            old = old + value if action == "append" else value
            continue
        place = old
        for step in path[:-1]:
            place = place[step]
        if action == "replace":
            place[path[-1]] = value
        elif action == "append":
            place[path[-1]] += value
        elif action == "add":
            place.insert(path[-1], value) if isinstance(place, list) else place.__setitem__(path[-1], value)
        elif action == "delete":
            del place[path[-1]]
    return old
