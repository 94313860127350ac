#!/usr/bin/env bash
# A robot with one lamp, in nothing but `buf curl`: one goal in words, then one that takes a tool.
#
#     examples/buf-curl/robot.sh [SOCKET [GOAL]]
#
# Prints the answers and returns 0; on an error prints its reason and the wrong fields and returns 1.
# The daemon's reflection tells buf the API. JSON is taken apart with python3; jq would do as well.
set -euo pipefail

socket=${1:-${XDG_RUNTIME_DIR:-/run}/edge-agent/api.sock}
goal=${2-Turn the lamp on.}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
buf=$(command -v buf || echo "$here/../../.venv/bin/buf")
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
lamp=$(cat <<'JSON'
{
  "name": "set_lamp",
  "description": "Switch the lamp.",
  "input_schema_json": "{\"type\": \"object\", \"properties\": {\"on\": {\"type\": \"boolean\"}}, \"required\": [\"on\"], \"additionalProperties\": false}",
  "examples": [{"goal": "Lights out.", "arguments_json": "{\"on\": false}"}]
}
JSON
)

# set_lamp ARGUMENTS: what the robot does when the model calls its tool.
set_lamp() {
  if [[ $(field on <<<"$1") == true ]]; then echo 'the lamp is on'; else echo 'the lamp is off'; fi
}

# call METHOD REQUEST: one call of the daemon. Each response on stdout ends with a line `}`.
call() {
  "$buf" curl --protocol grpc --unix-socket "$socket" -H 'edge-agent-client: buf-curl' -d "$2" \
    "http://localhost/edge_agent.v1.RunService/$1" 2>"$errors" || fail
}

# field PATH: the text, or else the JSON, at a dotted path of the JSON on stdin; 1 if nothing is there.
field() {
  python3 -c '
import json, sys
value = json.load(sys.stdin)
try:
    for key in sys.argv[1].split("."):
        value = value[int(key) if isinstance(value, list) else key]
except (IndexError, KeyError):
    sys.exit(1)
print(value if isinstance(value, str) else json.dumps(value))' "$1"
}

# quoted TEXT: it as a JSON string.
quoted() {
  python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"
}

# detail TYPE: a detail of the last error as JSON. It comes as a protobuf message in base64.
detail() {
  python3 -c '
import base64, json, sys
for each in json.load(sys.stdin).get("details", []):
    if each["type"] == sys.argv[1]:
        sys.stdout.buffer.write(base64.b64decode(each["value"] + "=="))' "$1" <"$errors" |
    "$buf" convert "$here/../protos" --type "$1" --from '-#format=binpb' --to '-#format=json'
}

# fail: say what the last error was, with every wrong field, and end.
fail() {
  local reason violation number=0
  reason=$(detail google.rpc.ErrorInfo | field reason) || { cat "$errors" >&2 && exit 1; }
  echo "error: $reason: $(field message <"$errors")" >&2
  while violation=$(detail google.rpc.BadRequest | field "fieldViolations.$number"); do
    echo "  $(field field <<<"$violation"): $(field description <<<"$violation")" >&2
    number=$((number + 1))
  done
  exit 1
}

# execute EVENT: run the tool calls of a step and hand in their results.
execute() {
  local run_id tool_call result number=0
  run_id=$(field event.runId <<<"$1")
  while tool_call=$(field "event.toolCallsIssued.toolCalls.$number" <<<"$1"); do
    echo "tool call    set_lamp($(field argumentsJson <<<"$tool_call"))"
    result=$(set_lamp "$(field argumentsJson <<<"$tool_call")")
    echo "tool result  $result"
    call SubmitToolResults "{\"run_id\": \"$run_id\", \"results\": [{
      \"tool_call_id\": \"$(field id <<<"$tool_call")\",
      \"parts\": [{\"text\": $(quoted "$result")}]
    }]}" >/dev/null
    number=$((number + 1))
  done
}

# finish EVENT: print the answer of the run that ended, or why it has none.
finish() {
  local run answer
  run=$(field event.runFinished.run <<<"$1")
  if answer=$(field answer <<<"$run"); then
    echo "answer       $answer"
  else
    echo "error: $(field error.reason <<<"$run"): $(field error.message <<<"$run")" >&2
    exit 1
  fi
}

# follow: act on the events on stdin until the run ends.
follow() {
  local line event=''
  while IFS= read -r line; do
    event+=$line
    if [[ $line == '}' ]]; then
      case $event in
        *'"toolCallsIssued"'*) execute "$event" ;;
        *'"runFinished"'*) finish "$event" ;;
      esac
      event=''
    fi
  done
}

[[ -S $socket ]] || { echo "error: $socket is no socket; is the daemon running?" >&2 && exit 1; }

echo 'goal         Say hello.'
call ExecuteRun '{"spec": {
  "messages": [{"role": "ROLE_USER", "parts": [{"text": "Say hello."}]}],
  "limits": {"max_output_tokens": 24}
}}' | follow

echo "goal         $goal"
created=$(call CreateRun "{\"spec\": {
  \"messages\": [{\"role\": \"ROLE_USER\", \"parts\": [{\"text\": $(quoted "$goal")}]}],
  \"tools\": [$lamp],
  \"limits\": {\"max_steps\": 3, \"max_output_tokens\": 64}
}}")
# From the first event on: some may have come before this watch begins.
call WatchRun "{\"run_id\": \"$(field run.id <<<"$created")\", \"after_sequence\": 0}" | follow
