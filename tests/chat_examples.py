"""Messages, and the examples of serving spec 2.5 as data: what the template must print, byte for byte."""

from __future__ import annotations

from typing import Any

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER_JSON = (
    '{"name": "get_weather", "description": "Get weather", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}}, "required": ["city"]}}'
)
BLOCK = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + WEATHER_JSON
    + "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def assistant(content: Any, *calls: dict[str, Any], think: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return (
        message | ({} if think is None else {"reasoning_content": think}) | ({"tool_calls": [*calls]} if calls else {})
    )


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


SUMS = [user("1+1?"), assistant("2", think="Add."), user("2+2?")]
PARIS = call("get_weather", city="Paris")
THANKS = [
    user("Weather in Paris?"),
    assistant("Let me check.", PARIS, think="Need tool."),
    tool('{"t": 18}'),
    assistant("18C.", think="Done."),
    user("Thanks"),
]
MAX, ASK = "[gMASK]<sop><|system|>Reasoning Effort: Max", "<|assistant|><think>"
REMINDER = (
    "<reminder>You are unable to process this {} because you don't have multi-modal input ability. "
    "Try different methods.</reminder>"
)

# name: (messages, tools and switches, text); add_generation_prompt unless it says otherwise
EXAMPLES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "E1": (
        [system("You are a helpful assistant."), user("Hi")],
        {},
        f"{MAX}<|system|>You are a helpful assistant.<|user|>Hi{ASK}",
    ),
    "E2": (
        [user("Hi")],
        {"reasoning_effort": "high"},
        f"[gMASK]<sop><|system|>Reasoning Effort: High<|user|>Hi{ASK}",
    ),
    "E3": (
        [system("Sys"), user("Hi")],
        {"enable_thinking": False},
        f"[gMASK]<sop><|system|>Sys<|user|>Hi{ASK}</think>",
    ),
    "E3b": (
        [user("Hi")],
        {"enable_thinking": False, "reasoning_effort": "high"},
        f"[gMASK]<sop><|user|>Hi{ASK}</think>",
    ),
    "E4": (SUMS, {}, f"{MAX}<|user|>1+1?<|assistant|><think></think>2<|user|>2+2?{ASK}"),
    "E5": (SUMS, {"clear_thinking": False}, f"{MAX}<|user|>1+1?<|assistant|><think>Add.</think>2<|user|>2+2?{ASK}"),
    "E5c": (
        [SUMS[0], assistant("<think>Add.</think>\n2\n"), SUMS[2]],
        {"clear_thinking": False},
        f"{MAX}<|user|>1+1?<|assistant|><think>Add.</think>2<|user|>2+2?{ASK}",
    ),
    "E6": (
        [system("Sys"), user("Weather?")],
        {"tools": [{"type": "function", "function": WEATHER}]},
        f"{MAX}{BLOCK}<|system|>Sys<|user|>Weather?{ASK}",
    ),
    "E6b": (
        [user("Hi")],
        {
            "tools": [
                {"type": "function", "function": WEATHER},
                function(name="f", strict=True, parameters={}),
                function(name="g", defer_loading=True),
            ]
        },
        f"{MAX}{BLOCK}<|user|>Hi{ASK}".replace("\n</tools>", '\n{"name": "f", "parameters": {}}\n</tools>'),
    ),
    "E7": (
        [
            user("Weather in Paris?"),
            assistant(
                "Let me check.",
                call("get_weather", city="Paris", days=3, metric=True, opts={"a": [1, 2]}),
                think="Need tool.",
            ),
            tool('{"t": 18}'),
        ],
        {},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think>Need tool.</think>Let me check.<tool_call>get_weather"
        "<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key><arg_value>3</arg_value>"
        "<arg_key>metric</arg_key><arg_value>true</arg_value><arg_key>opts</arg_key>"
        '<arg_value>{"a": [1, 2]}</arg_value></tool_call>'
        f'<|observation|><tool_response>{{"t": 18}}</tool_response>{ASK}',
    ),
    "E7b": (
        [user("Weather?"), assistant("", call("get_weather", city="Tokyo"), PARIS), tool("22"), tool("18")],
        {},
        f"{MAX}<|user|>Weather?<|assistant|><think></think>"
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Tokyo</arg_value></tool_call>"
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        f"<|observation|><tool_response>22</tool_response><tool_response>18</tool_response>{ASK}",
    ),
    "E8": (
        THANKS,
        {},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think></think>Let me check."
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        '<|observation|><tool_response>{"t": 18}</tool_response>'
        f"<|assistant|><think></think>18C.<|user|>Thanks{ASK}",
    ),
    "E8b": (
        THANKS,
        {"clear_thinking": False},
        f"{MAX}<|user|>Weather in Paris?<|assistant|><think>Need tool.</think>Let me check."
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        '<|observation|><tool_response>{"t": 18}</tool_response>'
        f"<|assistant|><think>Done.</think>18C.<|user|>Thanks{ASK}",
    ),
    "E9": (
        [user("go"), assistant("", call("f", x="1"), think="R1"), tool("a"), assistant("", call("g")), tool("b")],
        {},
        f"{MAX}<|user|>go<|assistant|><think>R1</think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value>"
        "</tool_call><|observation|><tool_response>a</tool_response><|assistant|><think></think><tool_call>g</tool_call>"
        f"<|observation|><tool_response>b</tool_response>{ASK}",
    ),
    "E10": (
        [user("Hi"), assistant("Hello", think="r")],
        {"add_generation_prompt": False},
        f"{MAX}<|user|>Hi<|assistant|><think>r</think>Hello",
    ),
    "E11": (
        [user([{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {}}, {"type": "input_audio"}])],
        {},
        f"{MAX}<|user|>A<|begin_of_image|><|image|><|end_of_image|>{REMINDER.format('audio')}{ASK}",
    ),
    "E12": (
        [
            user("find"),
            assistant("", call("search", q="w"), think=""),
            tool([{"type": "tool_reference", "name": "get_weather"}]),
        ],
        {"tools": [WEATHER]},
        f"{MAX}{BLOCK}<|user|>find<|assistant|><think></think>"
        "<tool_call>search<arg_key>q</arg_key><arg_value>w</arg_value></tool_call>"
        f"<|observation|><tool_response><tools>\n{WEATHER_JSON}\n</tools></tool_response>{ASK}",
    ),
    "E13": (
        [user("q"), assistant("", call("f")), tool([{"output": "o1"}, {"output": "o2"}])],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think><tool_call>f</tool_call>"
        f"<|observation|><tool_response>o1</tool_response><tool_response>o2</tool_response>{ASK}",
    ),
    "E15": (
        [user("q"), assistant(None, call("f")), tool("r")],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think>None<tool_call>f</tool_call>"
        f"<|observation|><tool_response>r</tool_response>{ASK}",
    ),
    "E18": (
        [user("q"), assistant("c"), system("note"), user("z")],
        {},
        f"{MAX}<|user|>q<|assistant|><think></think>c<|system|>note<|user|>z{ASK}",
    ),
    "E19": ([{"role": "developer", "content": "dev"}, user("z")], {}, f"{MAX}<|user|>z{ASK}"),
}
EXAMPLES |= {
    f"E2b-{effort}": ([user("Hi")], {"reasoning_effort": effort}, f"{MAX}<|user|>Hi{ASK}")
    for effort in ("low", None, "medium", "none", "max")
}
