"""Why the comparison comes out as it does, as far as the tables say."""

import math
from collections.abc import Iterable, Sequence

from scipy.stats import spearmanr

from evaluation.appendix import by_value, only, shared_prompts, tried_settings
from evaluation.document import Bullets, Heading, listed
from evaluation.results import HEADLINE, Section, rank, reported, values
from evaluation.statistics import ENOUGH_PROMPTS, interval, paired

DISTANCE = HEADLINE[1]
SCALE = "system.guidance.guidance_scale"
# settings that make denoising losses another thing: the last hangs on the timesteps drawn
OTHERWISE = (SCALE, "timestep_schedule", "max_step_percent")
ENOUGH = 5  # contestants, to speak of a correlation
CLEAR = 0.6  # a rank correlation that is called one
HIGH, WORSE = 25, 1.2  # a scale that is high, and by what factor SDS has to be worse at it


def reasons(found: Sequence[Section], tuning: Sequence[dict] | None) -> list:
    """The section's blocks; none where the tables say nothing of it."""
    studies = [s for s in found if s not in reported(found)]
    told = (tell(study) for study in studies for tell in (at_one_scale, learning_pays))
    items = [*_scales(tuning or ()), *filter(None, told)]
    return [Heading(2, "Why"), Bullets(items)] if items else []


def _scales(tuning: Iterable[dict]) -> list[str]:
    """What a high guidance scale does to SDS, and to the LODS priors."""
    told, groups = [], tried_settings(tuning)
    for canvas in sorted({canvas for canvas, _ in groups}):
        tried = {prior: of for (where, prior), of in groups.items() if where == canvas}
        common = shared_prompts(tried)
        every = {r["prompt"] for of in tried.values() for rows in of.values() for r in rows}
        # settings that went on to a second round, of priors for which these have several scales
        whole = {
            prior: {s: rows for s, rows in of.items() if {r["prompt"] for r in rows} == every}
            for prior, of in tried.items()
        }
        later = by_value(whole, SCALE) if every > common else {}
        tried = {prior: only(of, common) for prior, of in tried.items()}
        parts, low = [], False
        for prior, of in sorted(by_value(tried, SCALE).items(), key=lambda item: rank(item[0])):
            if prior != "sds" and not prior.startswith("lods-"):
                continue
            best, last = min(of, key=of.get), max(of)
            low |= prior == "sds" and last >= HIGH and of[last] > WORSE * of[best]
            text = f"{prior} is best at {best:g} ({DISTANCE.show(of[best])})"
            if best < last:
                text += f" and has {of[last] / of[best]:.2f} times that at {last:g}"
            if prior in later:
                ends = [f"{DISTANCE.show(d)} at {s:g}" for s, d in sorted(later[prior].items())]
                text += f" (in the second round, over {len(every)} prompts, {listed(ends)})"
            parts.append(text)
        if parts:
            text = (
                f"{canvas}, {DISTANCE.title} by guidance scale in the tuning with "
                f"{listed(sorted(common))}: {'; '.join(parts)}."
            )
            if low:
                text += (
                    " SDS does best at a low scale, and each prior has its own here: so the "
                    "comparison says little of high scales, at which SDS saturates."
                )
            told.append(text)
    return told


def at_one_scale(section: Section) -> str | None:
    """Which LODS priors are better than all others in a study of one guidance scale; None where it
    has no others, or too few prompts to say."""
    runs = {
        name: values(rows, DISTANCE.column)
        for name, rows in section.runs.items()
        if not any(f"{SCALE}=" in r.get("settings", "") for r in rows)
    }
    runs = {n: r for n, r in runs.items() if {prompt for prompt, _ in r} == set(section.prompts())}
    others = {n: r for n, r in runs.items() if n not in section.lods}
    learnt = {n: r for n, r in runs.items() if n in section.lods}
    if not others or not learnt or len(section.prompts()) < ENOUGH_PROMPTS:
        return None
    means = {n: DISTANCE.show(interval(r, draws=1).mean) for n, r in runs.items()}
    better = [
        f"{n} ({means[n]})"
        for n, r in learnt.items()
        if all(paired(r, other).sign == DISTANCE.better for other in others.values())
    ]
    against = listed([f"{n} ({means[n]})" for n in others])
    text = (
        f"{section.canvas} (grid {section.grid}), {DISTANCE.title} at one guidance scale for all, "
    )
    if len(learnt) > 1:
        best = min(learnt, key=lambda n: (interval(learnt[n], draws=1).mean, n))
        text += f"{len(learnt)} LODS priors: the lowest mean has {best} ({means[best]}); "
    if better:
        return f"{text}measurably better than {against}: {listed(better)}."
    return f"{text}none is measurably better than all of {against}."


def learning_pays(section: Section) -> str | None:
    """Whether those that learn better are better, in a study of one guidance scale; None where it
    has too few prompts or contestants to say."""
    pairs = []
    for name in section.lods:
        runs = [
            r for r in section.runs[name] if not any(k in r.get("settings", "") for k in OTHERWISE)
        ]
        ends = [values(runs, column) for column in ("prior_loss_last", DISTANCE.column)]
        # over the same prompts, or else their difficulty is compared
        if all({prompt for prompt, _ in e} == set(section.prompts()) for e in ends):
            pairs.append([interval(e, draws=1).mean for e in ends])
    if len(section.prompts()) < ENOUGH_PROMPTS or len(pairs) < ENOUGH:
        return None
    r = spearmanr(*zip(*pairs)).statistic
    if math.isnan(r):
        return None
    said = "is the better" if r > 0 else "is the worse"
    said = said if abs(r) >= CLEAR else "is neither clearly better nor worse"
    return (
        f"{section.canvas} (grid {section.grid}): of {len(pairs)} ways to learn at one guidance "
        f"scale, the one that ends with less denoising loss {said} in {DISTANCE.title} (rank "
        f"correlation {r:+.2f})."
    )
