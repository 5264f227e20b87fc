"""Named workloads: published traces reduced to distributions, for use without the files.

Lengths are quantile grids: the quantiles of the trace, linear between them. Prompts and outputs are drawn
independently. The grids keep the mean, p50 and p90, which a test holds to the traces. They lose the correlation of
prompts with outputs, prefixes and sessions, and make the last thousandth a straight line to the maximum. Where that
matters, replay the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.workload.arrivals import Arrivals, Gamma, OnOff, Poisson
from chairlift.sim.workload.clients import Lognormal as ThinkLognormal
from chairlift.sim.workload.clients import Seconds, Sessions
from chairlift.sim.workload.lengths import Lengths, Lognormal, Quantiles


@dataclass(frozen=True)
class Named:
    """A workload known by name. ``arrivals`` is None if the source has lengths only."""

    text: str  # what the trace is, what was fitted and what the fit loses
    source: str  # where the trace is, and whom to cite
    licence: str
    prompt_tokens: Lengths  # with sessions: the new tokens of a turn
    output_tokens: Lengths
    arrivals: Arrivals | None = None  # with sessions: of their starts
    sessions: Sessions | None = None

    def arrivals_at(self, rate_per_s: float | None) -> Arrivals | None:
        """The arrivals, stretched to ``rate_per_s`` if that is given; Poisson at that rate if the trace has none."""
        if rate_per_s is None:
            return self.arrivals
        if self.arrivals is None:
            return Arrivals(poisson=Poisson(rate_per_s=rate_per_s))
        return self.arrivals.rescaled(rate_per_s)


def names() -> list[str]:
    """Names of all workloads, sorted."""
    return sorted(_WORKLOADS)


def get(name: str) -> Named:
    """The workload of that name.

    Raises:
        BadInput: there is none of that name; the nearest name is suggested.
    """
    if name not in _WORKLOADS:
        raise BadInput(Problem(f"no such workload{did_you_mean(name, names())}", path="name", value=name))
    return _WORKLOADS[name]


def describe(name: str) -> str:
    """The workload in words: what it is, its mean lengths (tokens), arrivals, source and licence.

    Raises:
        BadInput: there is no workload of that name.
    """
    known = get(name)
    mean = f"{known.prompt_tokens.mean_tokens():.0f} in, {known.output_tokens.mean_tokens():.0f} out"
    arrivals = "none: give arrivals, or rate_per_s for Poisson"
    if known.arrivals is not None:
        [(process, settings)] = known.arrivals.model_dump(exclude_none=True).items()
        arrivals = f"{process} " + ", ".join(f"{key} {value:g}" for key, value in settings.items())
    if known.sessions is not None:
        turns, first = known.sessions.turns, known.sessions.first_prompt_tokens
        mean += f" a turn; {turns.mean_tokens():.0f} turns"
        mean += f", the first of {first.mean_tokens():.0f}" if first is not None else ""
    lines = [known.text, f"Mean tokens: {mean}", f"Arrivals: {arrivals}", f"Source: {known.source}"]
    return "\n".join([f"{name}: {lines[0]}", *lines[1:], f"Licence: {known.licence}"])


def _grid(levels_pct: list[float], tokens: list[float]) -> Lengths:
    return Lengths(quantiles=Quantiles(levels_pct=levels_pct, tokens=tokens))


# fmt: off
_LEVELS: list[float] = [
    0, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 99.5, 99.9,
    100]

_WORKLOADS = {
    "azure-conv-2023": Named(
        text=(
            "An hour of chat on Azure in November 2023, 19,366 requests. Gamma gaps by maximum likelihood "
            "(shape 0.871); the slow drift from 190 to 510 requests a minute is lost."
        ),
        source=(
            "github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv; Patel et al., "
            "Splitwise, ISCA 2024"
        ),
        licence="CC-BY-4.0",
        prompt_tokens=_grid(_LEVELS, [
            2, 29, 91, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189,
            1315, 1876, 2734, 4083, 4098, 4142, 4831, 6179, 14050]),
        output_tokens=_grid(_LEVELS, [
            7, 16, 24, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424,
            451, 540, 601, 643, 954, 1000]),
        arrivals=Arrivals(gamma=Gamma(rate_per_s=5.530, cv=1.072)),
    ),
    "azure-code-2023": Named(
        text=(
            "An hour of code completion on Azure in November 2023, 8,819 requests. A lognormal mixture "
            "misses the cut of prompts at 7,437 and is 10% off at p90, so this is a grid too, with more "
            "levels in the output's tail. On/off arrivals: 45 silences over 10 s hold 2,377 of 3,436 s; "
            "the gaps while on are burstier (CV 3.0) than the Poisson used here."
        ),
        source=(
            "github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_code.csv; Patel et al., "
            "Splitwise, ISCA 2024"
        ),
        licence="CC-BY-4.0",
        prompt_tokens=_grid(_LEVELS, [
            3, 17, 35, 75, 147, 232, 386, 578, 770, 939, 1075, 1261, 1469, 1690, 1909, 2164, 2433, 2744,
            3192, 3920, 5188, 7303, 7436, 7436, 7436, 7437, 7437]),
        output_tokens=_grid([
            0, 5, 10, 20, 25, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 92.5, 95, 96.5, 98, 98.5,
            99, 99.5, 99.75, 99.9, 99.95, 100], [
            6, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 29, 39, 55, 69, 90, 115, 171, 201, 251,
            359, 599, 825, 885, 1899]),
        # 46 on periods in 1,058.5 s; silences (there 52.8 s) such that the mean rate is the trace's.
        arrivals=Arrivals(on_off=OnOff(rate_per_s=8.288, on_s=23.01, off_s=51.31)),
    ),
    "mooncake-conversation": Named(
        text=(
            "An hour of Kimi chat with long prompts, 12,031 requests. Stamps sit on a 3 s grid, within "
            "which arrivals are as good as Poisson. Prefix reuse (37% of prompt tokens) is lost: replay "
            "the file for that."
        ),
        source=(
            "github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl; Qin et al., "
            "Mooncake, FAST 2025"
        ),
        licence="Apache-2.0",
        prompt_tokens=_grid(_LEVELS, [
            891, 894, 896, 901, 964, 1261, 1662, 2306, 3263, 4251, 4993, 5870, 6909, 8187, 9570, 11238,
            13196, 15367, 17869, 21464, 27367, 39550, 66449, 85400, 100810, 121301, 126195]),
        output_tokens=_grid(_LEVELS, [
            1, 3, 3, 10, 24, 46, 100, 156, 213, 256, 291, 322, 350, 375, 399, 423, 447, 472, 504, 543,
            597, 698, 892, 1119, 1568, 2000, 2000]),
        arrivals=Arrivals(poisson=Poisson(rate_per_s=3.401)),
    ),
    "sharegpt": Named(
        text=(
            "ShareGPT conversations of at most 8,192 tokens, 30,731 requests, Llama-2 tokenizer. Lengths "
            "only. A prompt and an output drawn apart may add up to more than the 8,192 of the original."
        ),
        source=(
            "github.com/project-etalon/etalon, sharegpt_8k_filtered_stats_llama2_tokenizer.csv; Agrawal "
            "et al., Etalon, arXiv:2407.07000"
        ),
        licence="Apache-2.0",
        prompt_tokens=_grid(_LEVELS, [
            1, 12, 16, 29, 74, 180, 382, 580, 777, 973, 1203, 1457, 1730, 2060, 2401, 2799, 3235, 3734,
            4278, 4918, 5696, 6563, 7164, 7434, 7622, 7854, 8141]),
        output_tokens=_grid(_LEVELS, [
            2, 6, 19, 44, 84, 130, 181, 228, 271, 312, 346, 381, 415, 453, 493, 534, 581, 628, 683, 754,
            834, 920, 975, 998, 1009, 1021, 1024]),
    ),
    "arxiv-summarization": Named(
        text=(
            "Summaries of arXiv papers, at most 4,096 tokens in all, 28,257 requests, Llama-2 tokenizer. "
            "Lengths only. The cap makes long outputs go with short prompts (Pearson -0.46); drawn apart, "
            "3% add up to more than 4,096."
        ),
        source=(
            "github.com/microsoft/vidur, "
            "data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv; Agrawal et "
            "al., Vidur, MLSys 2024"
        ),
        licence="MIT",
        prompt_tokens=_grid(_LEVELS, [
            1, 73, 229, 749, 1242, 1564, 1802, 1986, 2150, 2308, 2453, 2596, 2730, 2861, 2996, 3127, 3249,
            3370, 3490, 3597, 3702, 3813, 3892, 3933, 3963, 4012, 4054]),
        output_tokens=_grid(_LEVELS, [
            5, 36, 44, 60, 78, 92, 104, 115, 125, 135, 145, 156, 167, 179, 192, 206, 222, 242, 268, 304,
            372, 736, 2775, 3271, 3582, 3844, 4056]),
    ),
    "claude-code-sessions": Named(
        text=(
            "Sessions of Claude Code, 710 of them with 48,658 requests of main agents. Turns and times to think "
            "are lognormal by maximum likelihood; first prompts, new tokens of a turn and outputs are grids. "
            "Prompts also shrink there when context is dropped (11% of turns): new tokens are cut at 4,000 "
            "instead, which keeps their mean (790 for 760). Subagents, pauses of days and what sessions share "
            "with one another are lost. Prompts reach 900,000 tokens: say a max_model_len."
        ),
        source=(
            "github.com/callanjfox/kv-cache-tester, traces/ (captured at WEKA); no paper, cite the repository"
        ),
        licence="Apache-2.0",
        prompt_tokens=_grid(_LEVELS, [
            1, 1, 1, 1, 1, 14, 27, 44, 73, 118, 161, 211, 272, 339, 430, 557, 716, 946, 1304, 1798, 2808, 4000,
            4000, 4000, 4000, 4000, 4000]),
        output_tokens=_grid(_LEVELS, [
            1, 58, 70, 89, 105, 117, 126, 137, 149, 161, 177, 195, 216, 242, 273, 311, 361, 426, 514, 639, 898,
            1554, 2793, 3686, 5018, 7982, 18195]),
        sessions=Sessions(
            turns=Lengths(lognormal=Lognormal(mu=3.675, sigma=1.160, cap=561)),
            think_s=Seconds(lognormal=ThinkLognormal(mu=2.838, sigma=1.571)),
            first_prompt_tokens=_grid(_LEVELS, [
                6343, 10245, 11362, 13048, 15458, 16951, 18129, 18600, 19276, 19792, 20553, 21429, 24454, 37888,
                61713, 68507, 89509, 104058, 125798, 163798, 258903, 374960, 536362, 708057, 794449, 847611, 851858]),
            max_context_tokens=900_000,
        ),
    ),
    "ragpulse": Named(
        text=(
            "A week of a university's question answering with retrieval, 7,106 requests. Lengths only: the "
            "week's 0.012 requests/s follow the hours of the day (see the arrivals called diurnal). Chunks "
            "that prompts share (31% of tokens as prefixes) are lost: replay the file for that."
        ),
        source="github.com/flashserve/RAGPulse, data/0_trace.jsonl; Wang et al., RAGPulse, arXiv:2511.12979",
        licence="MIT",
        prompt_tokens=_grid(_LEVELS, [
            1052, 1052, 1053, 1055, 1110, 1361, 2019, 2754, 2879, 2962, 3025, 3083, 3140, 3192, 3244, 3300,
            3364, 3437, 3531, 3693, 3958, 4425, 5004, 5438, 5786, 6433, 7712]),
        output_tokens=_grid(_LEVELS, [
            7, 36, 36, 66, 83, 96, 113, 131, 151, 171, 191, 212, 234, 256, 284, 313, 346, 385, 436, 489, 563,
            670, 782, 891, 994, 1182, 2183]),
    ),
    "servegen-deepseek-r1": Named(
        text=(
            "A day of a reasoning model, 73 clients drawn as one: lengths of all, weighted by requests. "
            "Poisson at the day's mean rate. Its rise and fall from 7 to 35 requests/s is lost (their first "
            "harmonic: arrivals: {diurnal: {rate_per_s: 16, swing: 0.52, peak_at_s: 2102}}), and so are bursts "
            "of clients (CV up to 5.6): servegen with the archive draws them."
        ),
        source="github.com/alibaba/ServeGen, data/reason/deepseek-r1; Xiang et al., ServeGen, arXiv:2505.09999",
        licence="Apache-2.0",
        prompt_tokens=_grid(_LEVELS, [
            4, 9, 10, 13, 18, 26, 29, 41, 57, 76, 113, 172, 208, 222, 266, 349, 406, 482, 748, 1165, 2092, 6714,
            16479, 23423, 28228, 33783, 57284]),
        output_tokens=_grid(_LEVELS, [
            9, 141, 170, 225, 287, 341, 387, 427, 470, 519, 582, 668, 792, 944, 1104, 1244, 1367, 1499, 1680,
            2196, 3432, 5701, 9338, 12607, 15737, 20833, 32768]),
        arrivals=Arrivals(poisson=Poisson(rate_per_s=16.01)),
    ),
}
# fmt: on
