"""Gate: may the challenger become champion? Only if it is not worse on the same protocol and the same data."""

from pathlib import Path

from components import registry, say, step
from components.registry import Version
from ffn.data.store import SkeletonSet


@step
def run(*, model: str, data: Path) -> str:
    """`promote` or `hold` for the version `model`; the reason becomes the version's tag `gate_reason`."""
    challenger = registry.at(model)
    champion = registry.version(challenger.name, alias="champion")
    if champion and champion.number == challenger.number:
        say("hold: it is the champion already")
        return "hold"
    verdict, reason = decide(challenger, champion, data)
    registry.mark(challenger, {"gate": verdict, "gate_reason": reason})
    say(f"{verdict}: {reason}")
    return verdict


def decide(challenger: Version, champion: Version | None, data: Path | None) -> tuple[str, str]:
    """The verdict on the challenger, and why; without `data` one that cannot measure a champion of other data again."""
    if champion is None:
        return "promote", "there is no champion yet"
    if challenger.tags.get("rolled_back"):
        return "hold", f"it was rolled back by hand ({challenger.tags['rolled_back']}); promote it by hand, with --force"
    for what in ("protocol", "layout", "layout_digest", "space", "classes_digest"):
        ours, theirs = challenger.tags.get(what), champion.tags.get(what)
        if ours != theirs:
            return "hold", f"not comparable with champion version {champion.number}: {what} {ours} against {theirs}"
    top1, best = float(challenger.tags["top1"]), float(champion.tags["top1"])
    where = ""
    if champion.tags["data_digest"] != challenger.tags["data_digest"]:
        if data is None:
            return "hold", f"champion version {champion.number} was measured on other data; give the challenger's set to measure it"
        best, where = top1_on(champion, data), f", measured again on data {challenger.tags['data_digest']}"
    verdict, words = ("promote", "not worse than") if top1 >= best else ("hold", "worse than")
    return verdict, f"top1 {100 * top1:.2f} % is {words} {100 * best:.2f} % of champion version {champion.number}{where}"


def top1_on(version: Version, data: Path) -> float:
    """Top-1 of a registered version on the held-out samples of `data`, streams fused as it was registered."""
    # Imported here: a gate without a champion to measure again starts without torch.
    from ffn.evaluation import evaluate
    from ffn.fusion import fuse
    from ffn.inference import FusedModel
    from ffn.scores import measure

    folder, skeletons = registry.download(version), SkeletonSet.open(data)
    weights = FusedModel.load(folder).weights
    scores = {stream: evaluate(skeletons, folder / stream) for stream in weights}
    return measure(fuse(scores, weights, version.tags["fusion"])).top1
