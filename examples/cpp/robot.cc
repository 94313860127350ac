// A robot with one lamp that takes a goal from edge-agent, over the unix socket.
//
//     robot [SOCKET [GOAL]]
//
// Prints the answer and returns 0; on an error prints its reason and the wrong fields and returns 1.

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include "edge_agent/v1/run_service.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace v1 = edge_agent::v1;

namespace {

std::string DefaultSocket() {
  const char* runtime_dir = std::getenv("XDG_RUNTIME_DIR");
  return std::string(runtime_dir ? runtime_dir : "/run") + "/edge-agent/api.sock";
}

// What the robot can do, as the model is told.
v1::Tool SetLampTool() {
  v1::Tool tool;
  tool.set_name("set_lamp");
  tool.set_description("Switch the lamp.");
  tool.set_input_schema_json(R"({
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": false
  })");
  v1::ToolExample* example = tool.add_examples();
  example->set_goal("Lights out.");
  example->set_arguments_json(R"({"on": false})");
  return tool;
}

// Executes one call. Its arguments satisfy the tool's schema.
v1::ToolResult Execute(const v1::ToolCall& call) {
  std::cout << "tool call    " << call.name() << "(" << call.arguments_json() << ")" << std::endl;
  v1::ToolResult result;
  result.set_tool_call_id(call.id());
  google::protobuf::Struct arguments;
  const auto parsed = google::protobuf::util::JsonStringToMessage(call.arguments_json(), &arguments);
  std::string text = parsed.ToString();
  if (parsed.ok()) {
    text = arguments.fields().at("on").bool_value() ? "the lamp is on" : "the lamp is off";
  }
  result.set_is_error(!parsed.ok());
  result.add_parts()->set_text(text);
  std::cout << "tool result  " << text << std::endl;
  return result;
}

v1::ConverseRequest Start(const std::string& goal) {
  v1::ConverseRequest request;
  v1::RunSpec* spec = request.mutable_start()->mutable_spec();
  v1::Message* message = spec->add_messages();
  message->set_role(v1::ROLE_USER);
  message->add_parts()->set_text(goal);
  *spec->add_tools() = SetLampTool();
  spec->mutable_limits()->set_max_steps(3);
  spec->mutable_limits()->set_max_output_tokens(64);
  return request;
}

// Gives the goal in one conversation. `run` is how the run ended, if it did.
grpc::Status Converse(v1::RunService::Stub& stub, const std::string& goal, v1::Run& run) {
  grpc::ClientContext context;
  context.AddMetadata("edge-agent-client", "cpp");
  const auto stream = stub.Converse(&context);
  stream->Write(Start(goal));
  v1::ConverseResponse response;
  while (stream->Read(&response)) {
    const v1::RunEvent& event = response.event();
    if (event.has_tool_calls_issued()) {
      v1::ConverseRequest results;
      // At once, so long before a call's `valid_for` is over.
      for (const v1::ToolCall& call : event.tool_calls_issued().tool_calls()) {
        *results.mutable_tool_results()->add_results() = Execute(call);
      }
      stream->Write(results);
    } else if (event.has_run_finished()) {
      run = event.run_finished().run();
      stream->WritesDone();
    }
  }
  return stream->Finish();
}

// Prints a failed call's reason and every wrong field, from google.rpc.Status in its trailer.
void PrintError(const grpc::Status& failed) {
  google::rpc::Status status;
  status.ParseFromString(failed.error_details());
  google::rpc::ErrorInfo info;
  google::rpc::BadRequest bad_request;
  for (const auto& detail : status.details()) {
    if (!detail.UnpackTo(&info)) detail.UnpackTo(&bad_request);
  }
  std::string reason = info.reason();
  if (reason.empty()) reason = "gRPC code " + std::to_string(failed.error_code());
  std::cerr << "error: " << reason << ": " << failed.error_message() << std::endl;
  for (const auto& wrong : bad_request.field_violations()) {
    std::cerr << "  " << wrong.field() << ": " << wrong.description() << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string socket = argc > 1 ? argv[1] : DefaultSocket();
  const std::string goal = argc > 2 ? argv[2] : "Turn the lamp on.";
  const auto stub =
      v1::RunService::NewStub(grpc::CreateChannel("unix:" + socket, grpc::InsecureChannelCredentials()));
  std::cout << "goal         " << goal << std::endl;
  v1::Run run;
  const grpc::Status status = Converse(*stub, goal, run);
  if (!status.ok()) {
    PrintError(status);
    return 1;
  }
  if (run.has_error()) {
    std::cerr << "error: " << run.error().reason() << ": " << run.error().message() << std::endl;
    return 1;
  }
  std::cout << "answer       " << run.answer() << std::endl;
  return 0;
}
