"""Both rules for one ONNX file."""

from __future__ import annotations

from gptconvert.checkpoint import Checkpoint
from gptconvert.verify.compare import Group, Trial
from gptconvert.verify.contract import check_contract
from gptconvert.verify.localise import first_bad_block
from gptconvert.verify.onnx_file import OnnxFile, open_onnx
from gptconvert.verify.onnx_runner import Binding, OnnxRunner, bind
from gptconvert.verify.probes import Level, Probe, make_probes, waves
from gptconvert.verify.report import ArtifactReport, RunReport, Stage
from gptconvert.verify.runners import available_memory
from gptconvert.verify.truth import TruthPass
from gptconvert.verify.weights import as_stored, check_onnx

#: Up to this many bytes of weights the model is also run as a user's plain session would run it: that copies them.
SMALL_MODEL = 600 << 20


def verify_onnx(checkpoint: Checkpoint, path: str, shown_as: str, level: Level, stage: Stage) -> ArtifactReport:
    """Verify one graph file and its external data.

    Raises:
        InputError: the file cannot be read as a model.
        UnsupportedError: its inputs or outputs are not known.
        UnsafeInputError: its external data lies where it must not.
    """
    file = open_onnx(path)
    checkpoint = as_stored(checkpoint, file.initializers.values())
    weights = check_onnx(file, checkpoint.weights, stage("comparing weights", checkpoint.nbytes))
    report = ArtifactReport("onnx", shown_as, weights)
    if file.ours:
        report.problems = check_contract(file, checkpoint.config)
    if not report.weights.ok or report.problems:
        return report  # what computes with the wrong weights computes the wrong thing
    binding = bind(file, checkpoint.config)
    probes = make_probes(
        checkpoint.config,
        kv_cache=bool(binding.past),
        free_positions="position_ids" in binding.inputs,
        level=level,
    )
    report.probes = [probe.as_dict() for probe in probes]
    report.runs = _run(file, binding, checkpoint, probes, stage)
    return report


def _run(
    file: OnnxFile, binding: Binding, checkpoint: Checkpoint, probes: tuple[Probe, ...], stage: Stage
) -> list[RunReport]:
    """Rule 2: wave by wave the truth, then one session after the other against it."""
    config, setups = checkpoint.config, _setups(file)
    reports = [RunReport(name, []) for name in setups]
    found: list[dict[str, Group]] = [{} for _ in setups]
    for wave in waves(probes):
        advance = stage("computing the truth", config.n_layer)
        truth = TruthPass(checkpoint, wave, binding.compute, presents=bool(binding.past)).run(advance)
        for (name, prepack), groups in zip(setups.items(), found, strict=True):
            advance = stage(f"running {name}", len(wave))
            Trial(OnnxRunner(file, binding, config, prepack=prepack), truth, config, groups).run(advance)
    for run, groups in zip(reports, found, strict=True):
        run.groups = list(groups.values())
        if not run.ok:
            stage("locating the error", 0)
            run.first_bad = first_bad_block(file, binding, checkpoint, run.groups)
    return reports


def _setups(file: OnnxFile) -> dict[str, bool]:
    """Session name → whether weights are prepacked.

    Any model is run with its weights where they are; one whose copy fits easily also as a user's session runs it.
    """
    setups = {"onnxruntime, weights in place": False}
    if file.weight_bytes <= min(SMALL_MODEL, available_memory() // 4):
        setups["onnxruntime, default options"] = True
    return setups
