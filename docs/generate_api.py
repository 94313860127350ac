"""Writes docs/api.md from the comments of the protos and from docs/api.yaml.

    make docs

The protos say what each service, call, message and state means; the YAML file adds what they can't:
the errors of each call, an example, and what to do about each reason. Which calls need admin.sock
is asked of the code. `tests/conventions/test_api_doc.py` fails when the page is not current, and
runs its examples.
"""

# ruff: noqa: INP001, T201
# A script, no package; it says what it has written.

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from edge_agent.api.interceptors import ADMIN_ONLY

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
DATA = ROOT / "docs" / "api.yaml"
PACKAGE = "edge_agent.v1"
HEAD = "<!-- Written by `make docs` from proto/edge_agent/v1 and docs/api.yaml: change those. -->"
WHERE = {
    "call": "a call",
    "run": "a run",
    "tool": "a tool result",
    "engine": "an engine",
    "command": "a command",
    "client": "the Python client",
    "log": "the daemon's log",
}
_FIELD = FieldDescriptorProto
# Numbers of the fields on the way to a comment in SourceCodeInfo (descriptor.proto).
_MESSAGE, _ENUM, _SERVICE, _MEMBER = 4, 5, 6, 2


@dataclass(frozen=True, slots=True)
class Protos:
    """The parsed protos, and the comment of everything in them by its full name."""

    files: tuple[FileDescriptorProto, ...]
    comments: Mapping[str, str]

    @property
    def services(self) -> tuple[ServiceDescriptorProto, ...]:
        """In the order of the page."""
        return tuple(service for file in self.files for service in file.service)

    @property
    def messages(self) -> Mapping[str, DescriptorProto]:
        """By name, those inside others left out."""
        return {each.name: each for file in self.files for each in file.message_type}

    @property
    def enums(self) -> Mapping[str, EnumDescriptorProto]:
        """By name."""
        return {each.name: each for file in self.files for each in file.enum_type}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: written")


def page() -> str:
    """The whole page."""
    protos, data = read_protos(), yaml.safe_load(DATA.read_text())
    parts = [HEAD, "# API", data["introduction"].strip(), "## Calls", *_overview(protos)]
    for service in protos.services:
        parts += [f"## {service.name}", protos.comments[service.name]]
        for method in service.method:
            parts += _method(protos, service, method, data)
    parts += ["## States and other enumerations"]
    for enum in protos.enums.values():
        parts += _enum(protos, enum)
    parts += ["## Messages", "What requests, responses and events are made of."]
    for message in _shared_messages(protos):
        parts += [f"### {message.name}", protos.comments[message.name]]
        parts += _fields(protos, message)
    parts += _reasons(data["reasons"])
    return "\n\n".join(part for part in parts if part) + "\n"


def read_protos() -> Protos:
    """Compile the protos and collect their comments.

    Raises:
        RuntimeError: protoc refused them; its messages are on stderr.
    """
    directory = ROOT / "proto"
    # Those that robots call first; types are shared by all.
    names = ("run_service", "engine_service", "system_service", "types")
    sources = [f"edge_agent/v1/{name}.proto" for name in names]
    found = {str(path.relative_to(directory)) for path in directory.rglob("*.proto")}
    if found != set(sources):
        raise RuntimeError(f"protos {sorted(found)}, this script knows {sorted(sources)}")
    well_known = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "protos.binpb"
        arguments = [f"-I{directory}", f"-I{well_known}", "--include_source_info"]
        if protoc.main(["protoc", *arguments, f"--descriptor_set_out={out}", *sources]) != 0:
            raise RuntimeError("protoc failed")
        compiled = FileDescriptorSet.FromString(out.read_bytes()).file
    by_name = {file.name: file for file in compiled}
    files = tuple(by_name[source] for source in sources)
    return Protos(files, dict(_comments(files)))


def _comments(files: Iterable[FileDescriptorProto]) -> Iterator[tuple[str, str]]:
    """The comment of each service, call, message, field, enumeration and value; empty for none."""
    for file in files:
        texts = {
            tuple(location.path): _text(location.leading_comments or location.trailing_comments)
            for location in file.source_code_info.location
        }
        groups: tuple[tuple[int, Sequence[Any], str], ...] = (
            (_MESSAGE, file.message_type, "field"),
            (_ENUM, file.enum_type, "value"),
            (_SERVICE, file.service, "method"),
        )
        for kind, things, members in groups:
            for index, thing in enumerate(things):
                yield thing.name, texts.get((kind, index), "")
                for number, member in enumerate(getattr(thing, members)):
                    path = (kind, index, _MEMBER, number)
                    yield f"{thing.name}.{member.name}", texts.get(path, "")


def _text(comment: str) -> str:
    return " ".join(line.strip() for line in comment.strip().splitlines())


def _overview(protos: Protos) -> Iterator[str]:
    rows = ["| call | socket | what it does |", "|---|---|---|"]
    for service in protos.services:
        for method in service.method:
            comment = protos.comments[f"{service.name}.{method.name}"]
            link = f"{service.name}.[{method.name}](#{method.name.lower()})"
            rows.append(f"| {link} | {_socket(service, method)} | {_first_sentence(comment)} |")
    yield "\n".join(rows)


def _first_sentence(text: str) -> str:
    return _cell(re.split(r"(?<=\.)\s", text, maxsplit=1)[0])


def _socket(service: ServiceDescriptorProto, method: MethodDescriptorProto) -> str:
    admin = f"/{PACKAGE}.{service.name}/{method.name}" in ADMIN_ONLY
    return "**admin.sock only**" if admin else "both"


def _method(
    protos: Protos,
    service: ServiceDescriptorProto,
    method: MethodDescriptorProto,
    data: Mapping[str, Any],
) -> Iterator[str]:
    """Everything about one call."""
    about = data["rpcs"][f"{service.name}.{method.name}"]
    asked, answered = (type_.rsplit(".", 1)[1] for type_ in (method.input_type, method.output_type))
    taken = f"a stream of {asked}" if method.client_streaming else asked
    given = f"a stream of {answered}" if method.server_streaming else answered
    yield f"### {method.name}"
    yield protos.comments[f"{service.name}.{method.name}"]
    yield f"Takes {taken}, gives {given}. Socket: {_socket(service, method)}."
    for name in (asked, answered):
        yield f"#### {name}"
        yield protos.comments[name]
        yield from list(_fields(protos, protos.messages[name])) or ["No fields."]
    errors = [_reason_link(reason) for reason in flat(about["errors"])]
    yield f"**Errors**: {', '.join(errors) or 'none but those of every call'}."
    yield str(about.get("note", "")).strip()
    yield _example(service, method, str(about.get("example", "")).strip())


def _example(service: ServiceDescriptorProto, method: MethodDescriptorProto, request: str) -> str:
    """A command that makes the call."""
    admin = f"/{PACKAGE}.{service.name}/{method.name}" in ADMIN_ONLY
    socket = "$ADMIN_SOCKET" if admin else "$API_SOCKET"
    url = f"http://localhost/{PACKAGE}.{service.name}/{method.name}"
    command = f'buf curl --protocol grpc --unix-socket "{socket}" \\\n  {url}'
    if request:
        end = "EOF" if "$" in request else "'EOF'"
        command += f" -d @- <<{end}\n{request}\nEOF"
    return f"```sh\n{command}\n```"


def _shared_messages(protos: Protos) -> Iterator[DescriptorProto]:
    """Those that are not the request or response of one call."""
    own = {
        type_.rsplit(".", 1)[1]
        for service in protos.services
        for method in service.method
        for type_ in (method.input_type, method.output_type)
    }
    for name, message in protos.messages.items():
        if name not in own:
            yield message


def _fields(protos: Protos, message: DescriptorProto) -> Iterator[str]:
    """A table of the fields; nothing for a message without any."""
    rows = ["| field | type | |", "|---|---|---|"]
    for field in message.field:
        comment = protos.comments[f"{message.name}.{field.name}"]
        if field.HasField("oneof_index") and not field.proto3_optional:
            oneof = message.oneof_decl[field.oneof_index].name
            comment = f"One of `{oneof}`. {comment}".strip()
        rows.append(f"| `{field.name}` | {_type(message, field)} | {_cell(comment)} |")
    if message.field:
        yield "\n".join(rows)


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """A field's type for readers, with a link where this page describes it."""
    name = field.type_name.rsplit(".", 1)[-1]
    entry = next((each for each in message.nested_type if each.name == name), None)
    if entry is not None and entry.options.map_entry:
        key, value = (_type(entry, each) for each in entry.field)
        return f"map of {key} to {value}"
    if not field.type_name:
        shown = _FIELD.Type.Name(field.type).removeprefix("TYPE_").lower()
    elif field.type_name.startswith(f".{PACKAGE}."):
        shown = f"[{name}](#{name.lower()})"
    else:
        shown = name
    if field.label == _FIELD.LABEL_REPEATED:
        return f"list of {shown}"
    return f"{shown}, optional" if field.proto3_optional else shown


def _enum(protos: Protos, enum: EnumDescriptorProto) -> Iterator[str]:
    yield f"### {enum.name}"
    yield protos.comments[enum.name]
    rows = ["| value | |", "|---|---|"]
    rows += [
        f"| `{value.name}` | {_cell(protos.comments[f'{enum.name}.{value.name}'])} |"
        for value in enum.value
        if value.number
    ]
    yield "\n".join(rows)


def _reasons(reasons: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "## Reasons"
    yield (
        "Every reason that an error of edge-agent can have. **Ends** is what it ends: a call (with "
        "this gRPC code), a run or an engine (in its `error`), a command of `edge-agent`, or a "
        "method of the Python client. The error of a run says `retryable` where the same request "
        "may succeed later."
    )
    rows = ["| reason | ends | code | what it means | what to do |", "|---|---|---|---|---|"]
    for reason, about in reasons.items():
        ends = ", ".join(WHERE[each] for each in about["where"])
        means, todo = _cell(about["means"]), _cell(about["do"])
        anchor = f'<a id="{reason.lower()}"></a>'
        rows.append(f"| {anchor}`{reason}` | {ends} | {about.get('code', '')} | {means} | {todo} |")
    yield "\n".join(rows)


def flat(reasons: Iterable[Any]) -> Iterator[str]:
    """Names from lists that may hold lists: YAML's way to share some."""
    for each in reasons:
        if isinstance(each, str):
            yield each
        else:
            yield from flat(each)


def _reason_link(reason: str) -> str:
    return f"[`{reason}`](#{reason.lower()})"


def _cell(text: str) -> str:
    """As a table's cell."""
    return text.strip().replace("\n", " ").replace("|", r"\|")


if __name__ == "__main__":
    main()
