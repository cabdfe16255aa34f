"""The vendors' own APIs: plain and streamed, cut off, failed; and nobody takes another vendor's answer for its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from support.usage_samples import CASES, READERS, SAMPLES, load

from sidecar.model.exchange import Usage
from sidecar.usage.formats.json_scanner import pruned
from sidecar.usage.providers.base import Document, Reader, build
from sidecar.usage.providers.declared import DeclaredReader
from sidecar.usage.providers.gemini import CloudCode
from sidecar.usage.providers.openai import AssistantRuns
from sidecar.usage.providers.selfhosted import SGLang
from sidecar.usage.providers.table import ROWS
from sidecar.usage.providers.watsonx import WatsonxChat
from sidecar.usage.readers import UsageTaps

FRAMES = "application/vnd.amazon.eventstream"


def read(
    path: str,
    body: bytes | Document,
    *,
    content_type: str = "text/event-stream",
    headers: dict[str, str] | None = None,
    whole: bool = True,
    size: int = 65_536,
    odd: list[str] | None = None,
) -> Usage | None:
    data = orjson.dumps(body) if isinstance(body, dict) else body
    taps = UsageTaps(anomaly=(odd if odd is not None else []).append)
    request = taps.request("POST", path, [])
    assert request is not None
    request.feed(b'{"model":"asked"}')
    fields = {"content-type": "application/json" if isinstance(body, dict) else content_type, **(headers or {})}
    response = taps.response(request, 200, [(key.encode(), value.encode()) for key, value in fields.items()])
    assert response is not None
    for start in range(0, len(data), size):
        response.feed(data[start : start + size])
    return response.finish(whole)


def events(*messages: Document | str, name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return "".join(
        f"{head}data: {message if isinstance(message, str) else orjson.dumps(message).decode()}\n\n"
        for message in messages
    ).encode()


def counted(usage: Usage | None) -> tuple[Any, ...]:
    assert usage is not None
    return usage.usage_state, usage.input_tokens, usage.output_tokens, usage.total_tokens


def streamed(path: str, body: bytes) -> Usage:
    """The same however it is cut."""
    whole = read(path, body)
    assert whole is not None
    assert whole.streamed
    for size in (1, 7, 50):
        assert read(path, body, size=size) == whole
    return whole


# watsonx

GENERATION = "/ml/v1/text/generation_stream"


def part_of_watsonx(entered: int, said: int, reason: str) -> Document:
    result = {"generated_text": "x", "generated_token_count": said, "input_token_count": entered}
    return {"model_id": "ibm/granite", "results": [result | {"stop_reason": reason}]}


def test_watsonx_counts_run_and_its_input_is_stated_once() -> None:
    messages = [part_of_watsonx(9, 1, "not_finished"), part_of_watsonx(0, 2, "not_finished")]
    usage = streamed(GENERATION, events(*messages, part_of_watsonx(0, 53, "max_tokens"), name="message"))
    assert counted(usage) == ("final", 9, 53, 62)
    assert (usage.model, usage.provider, usage.finish_reasons) == ("ibm/granite", "ibm.watsonx.ai", ["max_tokens"])
    assert counted(read(GENERATION, events(*messages), whole=False)) == ("partial", 9, 2, 11)


@pytest.mark.parametrize("path", ["/ml/v1/text/embeddings", "/gateway/ml/v1/text/rerank"])
def test_watsonx_embeddings_and_rerank_have_an_input_alone(path: str) -> None:
    body = {"model_id": "ibm/slate", "results": [{"index": 0, "score": 0.5}], "input_token_count": 20}
    assert counted(read(path, body)) == ("final", 20, None, 20)


def test_watsonx_chat_streams_name_the_model_their_way() -> None:
    base = {"id": "c", "model_id": "meta/llama", "created_at": "2026-01-01T00:00:00Z"}
    usage = streamed(
        "/ml/v1/text/chat_stream",
        events(
            base | {"choices": [{"index": 0, "delta": {"content": "o"}, "finish_reason": None}]},
            base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            base | {"choices": [], "usage": {"prompt_tokens": 59, "completion_tokens": 47, "total_tokens": 106}},
        ),
    )
    assert counted(usage) == ("final", 59, 47, 106)
    assert (usage.model, usage.provider) == ("meta/llama", "ibm.watsonx.ai")


# Oracle

OCI = "/20231130/actions/chat"


def test_oracles_details_are_read_under_its_names() -> None:
    used = {
        "promptTokens": 73,
        "completionTokens": 43,
        "totalTokens": 116,
        "promptTokensDetails": {"cachedTokens": 64},
        "completionTokensDetails": {"reasoningTokens": 12},
    }
    for answer in ({"apiFormat": "GENERIC", "choices": [{"finishReason": "stop"}]}, {"apiFormat": "COHERE"}):
        usage = read(OCI, {"modelId": "m", "chatResponse": {**answer, "usage": used}})
        assert counted(usage) == ("final", 73, 43, 116)
        assert usage is not None
        assert (usage.cache_read_input_tokens, usage.reasoning_output_tokens, usage.model) == (64, 12, "m")
        assert usage.raw_usage == used


def test_oracles_stream_is_final_with_its_usage_and_absent_where_it_was_not_asked_for() -> None:
    text = {"index": 0, "message": {"role": "ASSISTANT", "content": [{"type": "TEXT", "text": "ok"}]}, "pad": "a"}
    end = {"finishReason": "stop", "pad": "aaa"}
    used = {"usage": {"promptTokens": 19, "completionTokens": 5, "totalTokens": 24}, "pad": "a"}
    usage = streamed(OCI, events(text, text, end, used))
    assert (*counted(usage), usage.finish_reasons) == ("final", 19, 5, 24, ["stop"])
    unasked = read(OCI, events(text, text, end))
    assert (*counted(unasked),) == ("absent", None, None, None)


# DashScope

DASHSCOPE = "/api/v1/services/aigc/multimodal-generation/generation"


def test_dashscopes_pictures_are_a_part_of_the_input_and_sound_may_stand_beside_it() -> None:
    body: Document = {"output": {"choices": [{"finish_reason": "stop"}]}, "request_id": "q"}
    usage = read(DASHSCOPE, body | {"usage": {"input_tokens": 1277, "output_tokens": 81, "image_tokens": 1247}})
    assert (*counted(usage), usage.image_input_tokens if usage else 0) == ("final", 1277, 81, 1358, 1247)
    usage = read(DASHSCOPE, body | {"usage": {"input_tokens": 33, "output_tokens": 10, "audio_tokens": 85}})
    assert (*counted(usage), usage.audio_input_tokens if usage else 0) == ("final", 118, 10, 128, 85)


def test_dashscopes_stream_is_cut_off_with_the_last_running_total() -> None:
    on = {"output": {"text": "o", "finish_reason": "null"}, "request_id": "q"}
    body = events(on | {"usage": {"input_tokens": 24, "output_tokens": 1}}, name="result")
    assert counted(read(DASHSCOPE, body, whole=False)) == ("partial", 24, 1, 25)
    end = {"output": {"text": "k", "finish_reason": "stop"}, "request_id": "q"}
    usage = streamed(DASHSCOPE, body + events(end | {"usage": {"input_tokens": 24, "output_tokens": 13}}))
    assert (*counted(usage), usage.response_id, usage.provider) == ("final", 24, 13, 37, "q", "alibaba.dashscope")


@pytest.mark.parametrize("path", ["/embeddings/text-embedding/text-embedding", "/rerank/text-rerank/text-rerank"])
def test_dashscopes_embeddings_state_a_total_that_is_input(path: str) -> None:
    body = {"output": {"embeddings": [{"text_index": 0}]}, "usage": {"total_tokens": 26}, "request_id": "q"}
    assert counted(read(f"/api/v1/services{path}", body)) == ("final", 26, None, 26)


def test_an_application_at_dashscope_may_ask_several_models() -> None:
    models = [{"model_id": "a", "input_tokens": 70, "output_tokens": 5}, {"input_tokens": 8, "output_tokens": 2}]
    body = {"output": {"finish_reason": "stop"}, "usage": {"models": models}, "request_id": "q"}
    assert counted(read("/api/v1/apps/a1/completion", body)) == ("final", 78, 7, 85)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (DASHSCOPE, {"code": "Throttling", "message": "x", "request_id": "q"}),
        ("/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/e", {"error_code": 336000, "error_msg": "x"}),
        ("/client/v4/accounts/a/ai/run/llama", {"success": False, "errors": [{"code": 7003}], "result": None}),
        (OCI, {"error": {"code": "InvalidParameter"}}),
        ("/v1/chat/completions", {"code": "Throttling", "message": "x", "request_id": "q"}),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_an_error_under_status_200_is_an_error(path: str, message: Document, plain: bool) -> None:
    usage = read(path, message if plain else events(message, name="error"))
    assert usage is not None
    assert (usage.usage_state, usage.error is not None, usage.input_tokens) == ("absent", True, None)


# The others' streams.


def test_lm_studio_tells_in_its_last_event() -> None:
    stats = {"input_tokens": 419, "total_output_tokens": 268, "reasoning_output_tokens": 5, "tokens_per_second": 43.7}
    result = {"model_instance_id": "qwen3", "output": [], "stats": stats, "response_id": "r1"}
    usage = streamed(
        "/api/v1/chat",
        events({"type": "chat.start", "model_instance_id": "qwen3"})
        + events(*[{"type": "message.delta", "content": "a"}] * 9)
        + events({"type": "chat.end", "result": result}),
    )
    assert counted(usage) == ("final", 419, 268, 687)
    assert (usage.model, usage.response_id, usage.provider) == ("qwen3", "r1", "lm_studio")
    assert usage.reasoning_output_tokens == 5


def test_reka_counts_run_and_its_reason_ends_them() -> None:
    def message(said: int, reason: str | None) -> Document:
        answers = [{"finish_reason": reason, "message": {"content": "o"}}]
        return {
            "id": "r",
            "model": "reka-core",
            "responses": answers,
            "usage": {"input_tokens": 71, "output_tokens": said, "reasoning_tokens": 2},
        }

    usage = streamed("/reka", events(message(5, None), message(313, "stop"), name="message"))
    assert (*counted(usage), usage.provider, usage.model) == ("final", 71, 313, 384, "reka", "reka-core")


def test_qianfan_is_final_with_its_last_event_alone() -> None:
    path = "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/ernie-4.0"

    def message(said: int, end: bool) -> Document:
        return {
            "id": "as-1",
            "object": "chat.completion",
            "sentence_id": said,
            "is_end": end,
            "is_truncated": False,
            "result": "o",
            "usage": {"prompt_tokens": 33, "completion_tokens": said},
        }

    usage = streamed(path, events(message(4, False), message(9, True)))
    assert (*counted(usage), usage.request_model) == ("final", 33, 9, 42, "ernie-4.0")
    assert counted(read(path, events(message(4, False)), whole=False)) == ("partial", 33, 4, 37)


def test_cortex_is_partial_until_its_usage_is_told() -> None:
    path = "/api/v2/cortex/inference:complete"
    text = {"id": "s", "model": "m", "choices": [{"delta": {"content": "o"}}], "usage": {}}
    assert counted(read(path, events(text), whole=False)) == ("absent", None, None, None)
    usage = streamed(path, events(text, text | {"usage": {"prompt_tokens": 31, "completion_tokens": 21}}))
    assert (*counted(usage), usage.provider) == ("final", 31, 21, 52, "snowflake.cortex")


def test_workers_ai_is_known_by_the_padding_of_its_events() -> None:
    path = "/client/v4/accounts/a1/ai/run/@cf/meta/llama"
    end = {"response": "", "usage": {"prompt_tokens": 6381, "completion_tokens": 353, "total_tokens": 6734}}
    usage = streamed(path, events(*[{"response": "o", "p": "ab"}] * 50, end, "[DONE]"))
    assert (*counted(usage), usage.provider) == ("final", 6381, 353, 6734, "cloudflare.workers_ai")


def test_cloud_code_is_read_in_its_envelope_and_without_it() -> None:
    used = {"promptTokenCount": 1001, "candidatesTokenCount": 7, "thoughtsTokenCount": 23, "totalTokenCount": 1031}
    answer = {"candidates": [{"finishReason": "STOP"}], "usageMetadata": used, "modelVersion": "gemini-3"}
    for body in (answer, {"response": answer, "traceId": "t"}):
        usage = read("/v1internal:generateContent", body)
        assert (*counted(usage), usage.model if usage else "") == ("final", 1001, 30, 1031, "gemini-3")


# SGLang


def meta(name: str | None, entered: int, said: int, reason: str | None = "stop") -> Document:
    about = {"prompt_tokens": entered, "completion_tokens": said, "cached_tokens": 8}
    return {"text": "o", "meta_info": about | {"id": name, "finish_reason": {"type": reason} if reason else None}}


@pytest.mark.parametrize("named", [True, False])
def test_each_answer_of_a_batch_at_sglang_is_counted(named: bool) -> None:
    reader = SGLang(lambda kind: None)
    for number, counts in enumerate([(907, 53), (10, 5), (1, 2)]):
        reader.message(meta(f"id{number}" if named else None, *counts), "")
    usage = build(reader, streamed=False, ended=True)
    assert (*counted(usage), usage.cache_read_input_tokens) == ("final", 918, 60, 978, 24)
    assert usage.finish_reasons == ["stop"] * 3


def test_streams_of_several_ids_at_sglang_run_side_by_side() -> None:
    one, two = meta("a", 907, 1, None), meta("b", 10, 1, None)
    body = events(one, two, meta("a", 907, 53), meta("b", 10, 4, None))
    assert counted(read("/x/generate", body, whole=False)) == ("partial", 917, 57, 974)
    usage = streamed("/x/generate", body + events(meta("b", 10, 5)) + events("[DONE]"))
    assert (*counted(usage), usage.provider) == ("final", 917, 58, 975, "sglang")


def test_more_answers_than_a_batch_may_have_are_an_anomaly() -> None:
    odd: list[str] = []
    reader = SGLang(odd.append)
    for number in range(1030):
        reader.message(meta(str(number), 10, 1), "")
    assert build(reader, streamed=False, ended=True).input_tokens == 10_240
    assert odd == ["batch_answers_dropped"] * 6


# Assistants


def run(status: str, used: Document | None = None, **more: Any) -> Document:
    return {"id": "run_1", "object": "thread.run", "status": status, "model": "gpt-4o", "usage": used, **more}


USED = {"prompt_tokens": 611, "completion_tokens": 19, "total_tokens": 630}


@pytest.mark.parametrize(
    "path", ["/v1/threads/runs", "/openai/threads/t1/runs", "/v1/threads/t/runs/r/submit_tool_outputs"]
)
@pytest.mark.parametrize("status", ["completed", "incomplete", "failed", "cancelled", "expired"])
def test_a_run_is_counted_with_its_end_and_its_steps_are_not(path: str, status: str) -> None:
    step = {"id": "step_1", "object": "thread.run.step", "status": "completed", "usage": USED}
    body = (
        events(run("queued"), name="thread.run.created")
        + events(step, name="thread.run.step.completed")
        + events(run(status, USED), name=f"thread.run.{status}")
        + events("[DONE]", name="done")
    )
    usage = streamed(path, body)
    assert (*counted(usage), usage.finish_reasons, usage.model) == ("final", 611, 19, 630, [status], "gpt-4o")
    without_names = b"\n\n".join(line for line in body.split(b"\n") if line.startswith(b"data:")) + b"\n\n"
    assert counted(read(path, without_names)) == ("final", 611, 19, 630)


def test_a_run_that_was_only_begun_is_absent_and_says_why() -> None:
    for body in (run("queued"), events(run("queued"), run("requires_action"), name="thread.run.requires_action")):
        usage = read("/v1/threads/runs", body)
        assert usage is not None
        assert (usage.usage_state, usage.input_tokens) == ("absent", None)
        assert usage.reason is not None
        assert "run" in usage.reason


# Bedrock agents

AGENT = "/agents/A1/agentAliases/B1/sessions/s1/text"


def frame(kind: str, payload: Document) -> bytes:
    head = b"".join(
        bytes([len(key)]) + key.encode() + b"\x07" + len(value).to_bytes(2, "big") + value.encode()
        for key, value in ((":event-type", kind), (":message-type", "event"))
    )
    body = orjson.dumps(payload)
    prelude = (len(head) + len(body) + 16).to_bytes(4, "big") + len(head).to_bytes(4, "big")
    message = prelude + zlib.crc32(prelude).to_bytes(4, "big") + head + body
    return message + zlib.crc32(message).to_bytes(4, "big")


def trace(kind: str, entered: int, said: int) -> bytes:
    metadata = {"usage": {"inputTokens": entered, "outputTokens": said}, "totalTimeMs": 5}
    return frame("trace", {"sessionId": "s", "trace": {kind: {"modelInvocationOutput": {"metadata": metadata}}}})


ANSWER = frame("chunk", {"bytes": "b2s="})


def test_an_agents_models_are_added_up() -> None:
    nested = {"agentCollaboratorInvocationOutput": {"metadata": {"usage": {"inputTokens": 500, "outputTokens": 50}}}}
    observed = frame("trace", {"trace": {"orchestrationTrace": {"observation": nested}}})
    body = trace("preProcessingTrace", 20, 3) + trace("orchestrationTrace", 91, 13) + observed
    body += trace("routingClassifierTrace", 7, 1) + ANSWER + trace("postProcessingTrace", 4, 2)
    for size in (1, 13, 4096):
        usage = read(AGENT, body, content_type=FRAMES, size=size)
        assert (*counted(usage), usage.provider if usage else "") == ("final", 122, 19, 141, "aws.bedrock")


def test_an_agent_without_traces_is_absent_and_one_cut_off_is_partial() -> None:
    assert counted(read(AGENT, ANSWER, content_type=FRAMES)) == ("absent", None, None, None)
    cut = read(AGENT, trace("orchestrationTrace", 91, 13), content_type=FRAMES, whole=False)
    assert counted(cut) == ("partial", 91, 13, 104)


# Units


@pytest.mark.parametrize(
    ("path", "header", "units"),
    [
        ("/v1/text-to-speech/v1", "character-cost", {"characters": 417}),
        ("/v1/text-to-speech/v1/stream", "Character-Cost", {"characters": 417}),
        ("/tts/v1/sound-generation", "character-cost", {"characters": 417}),
        ("/v1/speak", "dg-char-count", {"characters": 417}),
        ("/any/path", "x-fal-billable-units", {"billable_units": 417}),
    ],
)
@pytest.mark.parametrize("content_type", ["audio/mpeg", "application/json"])
def test_units_stand_in_a_header_whatever_the_body_is(
    path: str, header: str, units: dict[str, int], content_type: str
) -> None:
    usage = read(path, b"{}", content_type=content_type, headers={header: "417"})
    assert usage is not None
    assert (usage.usage_state, usage.units) == ("final", units)
    without = read(path, b"\xff\xfb\x90\x00", content_type="audio/mpeg")
    assert without is None or without.usage_state == "absent"


def test_seconds_of_sound_are_units() -> None:
    heard = {"metadata": {"request_id": "dg1", "duration": 25.933313, "channels": 1}, "results": {}}
    usage = read("/v1/listen?model=nova-3", heard)
    assert usage is not None
    assert (usage.usage_state, usage.units, usage.response_id) == ("final", {"audio_seconds": 25.933313}, "dg1")
    verbose = {"task": "transcribe", "language": "english", "duration": 8.47, "text": "x"}
    usage = read("/v1/audio/transcriptions", verbose)
    assert usage is not None
    assert (usage.usage_state, usage.units) == ("final", {"audio_seconds": 8.47})


@pytest.mark.parametrize("where", ["meta", "data"])
def test_pages_as_text_have_tokens_without_a_side(where: str) -> None:
    body = {"code": 200, "status": 20000, "data": {"content": "x"}, where: {"usage": {"tokens": 1211}}}
    usage = read("/", body)
    assert (*counted(usage), usage.provider if usage else "") == ("final", None, None, 1211, "jina")


def test_rerank_units_are_search_units() -> None:
    body = {"model": "bge", "data": [{"index": 0, "score": 0.9}], "usage": {"rerank_units": 3}}
    usage = read("/rerank", body)
    assert usage is not None
    assert (usage.usage_state, usage.units, usage.provider) == ("final", {"search_units": 3}, "pinecone")


@pytest.mark.parametrize("path", ["/score", "/v1/score", "/pooling", "/classify", "/v1/classify", "/v1/ranking"])
def test_what_scores_and_classifies_states_an_input(path: str) -> None:
    usage = read(path, {"object": "list", "data": [], "usage": {"prompt_tokens": 26, "total_tokens": 26}})
    assert counted(usage) == ("final", 26, None, 26)


# Transcriptions


def test_mistrals_last_event_is_final_and_so_is_anybodys_that_has_usage() -> None:
    used = {"prompt_audio_seconds": 13, "prompt_tokens": 401, "completion_tokens": 27, "total_tokens": 428}
    for kind in ("transcription.done", "audio.transcript.done", "transcription.completed"):
        body = events({"type": "transcription.text.delta", "text": "a"}, {"type": "transcription.segment.done"})
        usage = streamed("/v1/audio/transcriptions", body + events({"type": kind, "model": "voxtral", "usage": used}))
        assert (*counted(usage), usage.units, usage.model) == ("final", 401, 27, 428, {"audio_seconds": 13}, "voxtral")


def test_vllms_chunks_are_read_as_chat() -> None:
    base = {"id": "t", "object": "transcription.chunk", "model": "whisper"}
    text = base | {"choices": [{"delta": {"content": "a"}, "index": 0}], "usage": {"prompt_tokens": 1503}}
    end = base | {"choices": [{"delta": {}, "finish_reason": "stop", "index": 0}]}
    last = base | {"choices": [], "usage": {"prompt_tokens": 1503, "completion_tokens": 28, "total_tokens": 1531}}
    usage = streamed("/v1/audio/transcriptions", events(text, text, end, last, "[DONE]"))
    assert (*counted(usage), usage.model, usage.finish_reasons) == ("final", 1503, 28, 1531, "whisper", ["stop"])
    assert counted(read("/v1/audio/translations", events(text), whole=False)) == ("partial", 1503, None, 1503)


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        ({"text": "x", "usage": {"prompt_audio_seconds": 31, "prompt_tokens": 5, "total_tokens": 9}}, "transcription"),
        ({"text": "x", "usage": {"type": "duration", "seconds": 9}}, "transcription"),
        ({"text": "x", "usage": {"type": "tokens", "input_tokens": 9, "output_tokens": 2}}, "transcription"),
        (
            {"created": 1, "data": [{"url": "u"}], "usage": {"generated_images": 1, "output_tokens": 5}},
            "image_generation",
        ),
        ({"created": 1, "data": [{"url": "u"}], "usage": {"cost_in_usd_ticks": 700}}, "image_generation"),
    ],
)
def test_sound_and_pictures_are_known_by_their_shape(body: Document, operation: str) -> None:
    usage = read("/some/gateway", body)
    assert usage is not None
    assert (usage.usage_state, usage.operation) == ("final", operation)


def test_no_row_that_is_read_says_openai() -> None:
    """It is what an answer is taken for that nothing gives away; a row of that name would be what a pin means."""
    assert not [row.api for row in ROWS if row.provider == "openai"]


# Nobody takes another's answer.

OWN: dict[str, set[str]] = {
    "d03": {"Reka"}, "d04": {"LmStudio"}, "d05": {"SGLang"}, "d06": {"SGLang"}, "e01": {"CloudCode"},
    "e02": {"CloudCode"}, "e03": {"CloudCode"}, "e04": {"WorkersAi"}, "e05": {"WorkersAi"}, "e07": {"Watsonx"},
    "e08": {"WatsonxChat"}, "e09": {"Oci"}, "e10": {"Oci"}, "e11": {"DashScope"}, "e12": {"DashScope"},
    "e17": {"AssistantRuns"}, "e18": {"Qianfan"}, "e19": {"JinaReader"}, "e22": {"Deepgram"},
}  # fmt: skip


def documents(body: bytes) -> Iterator[Document]:
    for line in (body, *body.splitlines()):
        try:
            document = orjson.loads(line.removeprefix(b"data:").strip())
        except ValueError:
            continue
        if type(document) is dict:
            yield document


@pytest.mark.parametrize("folder", [SAMPLES, CASES], ids=["samples", "cases"])
def test_a_vendors_reader_claims_its_own_answers_alone(folder: Any) -> None:
    ours: list[type[Reader]] = [
        reader for reader in READERS if issubclass(reader, DeclaredReader | AssistantRuns | CloudCode | WatsonxChat)
    ]
    for name, sample in load(folder).items():
        claimed = {reader.__name__ for body in documents(sample.body) for reader in ours if reader.claims(body)}
        if folder is CASES:
            assert claimed == OWN.get(name[:3], set()), name
        else:  # of the samples: none, or the provider's own
            assert claimed <= {row.reader.__name__ for row in ROWS if row.provider == sample.provider}, name


def test_what_is_skimmed_of_a_large_answer_is_enough_to_claim_and_to_read_it() -> None:
    """A place that is asked for and not wanted would be lost as soon as an answer is large."""

    def used(reader: type[Reader], document: Document) -> Usage:
        one = reader(lambda kind: None)
        one.document(document)
        return build(one, streamed=False, ended=True)

    for name, sample in load(CASES).items():
        for reader in READERS:
            if name.endswith(".json") and reader.__name__ in OWN.get(name[:3], set()):
                skimmed = pruned(sample.body, reader.wanted)
                assert reader.claims(skimmed), name
                assert used(reader, skimmed) == used(reader, orjson.loads(sample.body)), name
