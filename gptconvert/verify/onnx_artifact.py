"""Both rules for one ONNX file."""

from __future__ import annotations

from collections.abc import Sequence

from gptconvert.checkpoint import Checkpoint
from gptconvert.verify.compare import Group, Trial, whole
from gptconvert.verify.contract import check_contract
from gptconvert.verify.localise import first_bad_block
from gptconvert.verify.onnx_file import OnnxFile, open_onnx
from gptconvert.verify.onnx_runner import Binding, OnnxRunner, bind
from gptconvert.verify.probes import Level, Probe, make_probes, waves
from gptconvert.verify.report import ArtifactReport, RunReport, Stage
from gptconvert.verify.runners import Outputs, RunError, available_memory, importing
from gptconvert.verify.truth import TruthPass
from gptconvert.verify.weights import as_stored, check_onnx
from reference_model.config import GPTConfig

#: Up to this many bytes of weights the model is also run as a user's plain session would run it: that copies them.
SMALL_MODEL = 600 << 20
IN_PLACE, DEFAULT = "onnxruntime, weights in place", "onnxruntime, default options"


def verify_onnx(checkpoint: Checkpoint, path: str, shown_as: str, level: Level, stage: Stage) -> ArtifactReport:
    """Verify one graph file and its external data.

    Raises:
        InputError: the file cannot be read as a model.
        UnsupportedError: its inputs or outputs are not known.
        UnsafeInputError: its external data lies where it must not.
    """
    file = open_onnx(path)
    checkpoint = as_stored(checkpoint, file.initializers.values())
    with importing("torch"):  # a second on one core; comparing leaves one half idle
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
    """Rule 2: wave by wave the truth, then one session after the other against it.

    Any model is run with its weights where they are; one whose copy fits easily also as a user's session runs it.
    """
    config = checkpoint.config
    small = file.weight_bytes <= min(SMALL_MODEL, available_memory() // 4)
    names = (IN_PLACE, DEFAULT) if small else (IN_PLACE,)
    found: dict[str, dict[str, Group]] = {name: {} for name in names}
    in_place = OnnxRunner(file, binding, config)
    for wave in waves(probes):
        _run_wave(file, binding, checkpoint, wave, in_place, found, stage)
    reports = [RunReport(name, list(groups.values())) for name, groups in found.items()]
    for run in reports:
        if not run.ok:
            stage("locating the error", 0)
            run.first_bad = first_bad_block(file, binding, checkpoint, run.groups)
    return reports


def _run_wave(
    file: OnnxFile,
    binding: Binding,
    checkpoint: Checkpoint,
    wave: Sequence[Probe],
    in_place: OnnxRunner,
    found: dict[str, dict[str, Group]],
    stage: Stage,
) -> None:
    """One wave of probes; its truth, which may be large, is gone on return."""
    config = checkpoint.config
    stage(f"running {IN_PLACE}", 0)
    early = _long_pasts(in_place, wave, config)
    advance = stage("computing the truth", config.n_layer)
    truth = TruthPass(checkpoint, wave, binding.compute, presents=bool(binding.past)).run(advance)
    for name, groups in found.items():
        advance = stage(f"running {name}", len(wave))
        runner = in_place if name == IN_PLACE else OnnxRunner(file, binding, config, prepack=True)
        Trial(runner, truth, config, groups, early if name == IN_PLACE else None).run(advance)


def _long_pasts(runner: OnnxRunner, wave: Sequence[Probe], config: GPTConfig) -> dict[Probe, Outputs]:
    """Answers to the probes with a long past, taken before the truth needs memory.

    onnxruntime holds every layer's keys and values at once, asked for or not: 600 MB for GPT-2 1558M.
    """
    answers = {}
    for probe in wave:
        if probe.shared_past:
            try:
                answers[probe] = whole(runner, probe, config)
            except RunError:
                continue  # it will fail again, where failures are reported
    return answers
