"""The meaning of a model provider's errors, in the wording of common servers."""

import re
from typing import Any

import pytest

from chatserver.sources.provider_errors import ErrorReport, TemporaryError, explain

TOO_LONG: dict[str, tuple[int | None, Any]] = {
    "OpenAI": (400, {"message": "no", "type": "invalid_request_error", "code": "context_length_exceeded"}),
    "OpenAI, one string": (400, {"message": "no", "code": "string_above_max_length"}),
    "OpenAI, tokens a minute": (
        429,
        {"message": "Request too large for gpt-4o on tokens per min (TPM): Limit 30000", "code": "rate_limit_exceeded"},
    ),
    "vLLM": (
        400,
        {
            "message": "This model's maximum context length is 8192 tokens. However, your request has 9000.",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    "vLLM without an error object": (
        400,
        {"object": "error", "message": "This model's maximum context length is 8192 tokens.", "code": 400},
    ),
    "vLLM, decoder prompt": (
        400,
        {"message": "The decoder prompt (length 9000) is longer than the maximum model length of 8192."},
    ),
    "vLLM, prompt": (400, {"message": "The prompt (total length 9000) is too long to fit into the model"}),
    "vLLM in a stream": (None, {"error": {"message": "maximum context length is 8192 tokens", "code": 400}}),
    "llama.cpp": (400, {"message": "no", "type": "exceed_context_size_error", "code": 400}),
    "llama.cpp, once": (500, {"message": "the request exceeds the available context size", "code": 500}),
    "llama.cpp, batch": (500, {"message": "input is too large to process. increase the physical batch size"}),
    "LM Studio": (400, "The number of tokens to keep from the initial prompt is greater than the context length."),
    "Ollama": (400, {"message": "input length exceeds the context length"}),
    "Mistral": (
        400,
        {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"},
    ),
    "SGLang": (400, {"message": "The input (9000 tokens) is longer than the model's context length (8192 tokens)."}),
    "TGI": (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."}),
    "Anthropic": (400, {"message": "prompt is too long: 208310 tokens > 200000 maximum"}),
    "Gemini": (
        400,
        [{"error": {"message": "The input token count (1200000) exceeds the maximum number of tokens allowed"}}],
    ),
    "LiteLLM": (400, {"message": "litellm.ContextWindowExceededError: no", "type": None, "code": "400"}),
    "FastAPI": (400, {"detail": "Please reduce the length of the messages."}),
    "proxy": (413, "<html>413 Request Entity Too Large</html>"),
}


@pytest.mark.parametrize(("status", "body"), TOO_LONG.values(), ids=TOO_LONG)
def test_a_prompt_that_is_too_long_is_recognised_and_not_retried(status: int | None, body: Any) -> None:
    error = explain(ErrorReport(status, body), "m")
    assert not isinstance(error, TemporaryError)
    assert error.code == "source_failed"
    assert "too long for the model m" in error.message and "OPENAI_HISTORY_CHARS" in error.message


OTHERS: dict[str, tuple[int | None, Any, str, str]] = {
    "no key": (401, None, "source_authentication", "OPENAI_API_KEY"),
    "payment": (402, {"message": "Insufficient Balance"}, "source_rate_limited", "credit"),
    "payment in a stream": (None, {"error": {"code": 402}}, "source_rate_limited", "credit"),
    "quota": (429, {"code": "insufficient_quota"}, "source_rate_limited", "credit"),
    "quota by type": (429, {"type": "exceeded_current_quota_error"}, "source_rate_limited", "credit"),
    "balance as 400": (400, {"message": "Your credit balance is too low"}, "source_rate_limited", "credit"),
    "no access": (403, {}, "source_authentication", "OPENAI_MODEL"),
    "unknown model": (404, {"error": "model 'm' not found, try pulling it first"}, "source_failed", "know the model m"),
    "unknown model as 400": (400, {"code": "model_not_found"}, "source_failed", "know the model m"),
    "wrong path": (405, {"detail": "Method Not Allowed"}, "source_failed", "OPENAI_BASE_URL"),
    "redirect": (301, "", "source_failed", "OPENAI_BASE_URL"),
    "filter": (400, {"code": "content_filter", "innererror": {}}, "source_refused", "Rephrase"),
    "filter in a stream": (None, {"error": {"code": "data_inspection_failed"}}, "source_refused", "Rephrase"),
    "bad request": (400, {"message": "bad"}, "source_failed", "(400)"),
    "message of another shape": (422, [{"loc": ["body"]}, {}], "source_failed", "(422)"),
    "nothing known": (None, {"error": {"message": "bad", "type": None}}, "source_failed", "reported an error"),
    "a number": (None, 7, "source_failed", "reported an error"),
}


@pytest.mark.parametrize(("status", "body", "code", "advice"), OTHERS.values(), ids=OTHERS)
def test_an_error_that_does_not_pass_says_what_to_do(status: int | None, body: Any, code: str, advice: str) -> None:
    error = explain(ErrorReport(status, body), "m")
    assert not isinstance(error, TemporaryError)
    assert error.code == code
    assert advice in error.message


TEMPORARY: dict[str, tuple[int | None, Any, str]] = {
    "rate limit": (429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}, "source_rate_limited"),
    "rate limit in a stream": (None, {"error": {"type": "rate_limit_error"}}, "source_rate_limited"),
    "throttled": (429, {"message": "Too many tokens, please wait before trying again."}, "source_rate_limited"),
    "free tier": (429, {"message": "Quota exceeded: generate_content_input_token_count"}, "source_rate_limited"),
    "loading": (503, {"message": "Loading model", "type": "unavailable_error"}, "source_unavailable"),
    "overloaded": (529, {"type": "error", "error": {"type": "overloaded_error"}}, "source_unavailable"),
    "in a stream": (None, {"error": {"code": "502", "message": "Bad Gateway"}}, "source_unavailable"),
    "in a stream, by name": (None, {"error": {"code": "server_error"}}, "source_unavailable"),
    "timeout": (408, "", "source_unavailable"),
}


@pytest.mark.parametrize(("status", "body", "code"), TEMPORARY.values(), ids=TEMPORARY)
def test_an_error_that_may_pass_is_retried(status: int | None, body: Any, code: str) -> None:
    error = explain(ErrorReport(status, body, {"retry-after": "5"}), "m")
    assert isinstance(error, TemporaryError)
    assert (error.code, error.wait_s) == (code, 5)
    assert "Retry in 5 s" in error.message


def test_an_error_after_a_redirect_blames_the_address() -> None:
    for status in (401, 404, 405):
        assert "redirect" in explain(ErrorReport(status, {}, redirected=True), "m").message
    assert "rate limit" in explain(ErrorReport(429, {}, redirected=True), "m").message


def test_no_sentence_quotes_the_server() -> None:
    secret = "sk-private"
    for status in (None, *range(300, 600)):
        for body in (secret, {"error": secret}, {"error": {"message": secret, "type": f"a {secret}", "code": 1}}):
            assert secret not in explain(ErrorReport(status, body), "m").message


def test_a_long_message_is_looked_at_quickly() -> None:
    words = "the prompt " * 1_000_000
    assert not re.search("too long", explain(ErrorReport(400, {"message": words}), "m").message)
