"""Verify an export of another tool against its checkpoint.

    python examples/verify_foreign_export.py CHECKPOINT EXPORT

EXPORT is a directory or a graph file: ONNX from optimum or torch.onnx, safetensors from transformers, a TensorFlow
SavedModel. A SavedModel is a program; verify one only if you trust its origin. Exit code 0: it computes what the
checkpoint computes. 5: it does not, and the report names the first difference.
"""

from __future__ import annotations

import sys

import gptconvert


def verify(source: str, artifact: str) -> bool:
    """Print the result for every artifact at ``artifact``, with the problems of those that fail."""
    report = gptconvert.verify_export(source, artifact)
    for found in report.artifacts:
        weights, groups = found.weights, [group for run in found.runs for group in run.groups]
        print(f"{found.path}: {'equal' if found.ok else 'DIFFERENT'}")
        print(f"  {weights.equal} of {weights.expected} weights are the checkpoint's, byte for byte")
        if groups:
            print(f"  {sum(group.ok for group in groups)} of {len(groups)} probe groups within rounding noise")
        for problem in [*weights.problems, *found.problems]:
            print(f"  {problem}")
        for run in found.runs:
            if run.first_bad:
                print(f"  {run.runtime}: the error begins in {run.first_bad}")
    return report.passed


def main(source: str, artifact: str) -> int:
    """Return the exit code of ``gptconvert verify``."""
    try:
        return 0 if verify(source, artifact) else gptconvert.errors.VerificationError.exit_code
    except gptconvert.errors.GptConvertError as error:  # unreadable, unsupported, unsafe
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
