"""What can go wrong, as one tree; every message says what, where, what was expected and what to do next.

    QronosError
    ├── UsageError            the request contradicts itself                       exit 2
    ├── CheckpointError       the model cannot be found, read or trusted
    ├── CalibrationError      the calibration text is missing, too short or unusable
    ├── TransformError        a transform and the model do not fit together
    ├── PlanError             a tensor and the wanted format do not fit together
    ├── ArtifactError         the written file is not what was calibrated
    ├── OutputError           the place to write to: occupied, full, read-only
    ├── OutOfMemoryError      of this machine or its GPU; the message says in which phase, and what needs less
    ├── RankError             another process of the run failed or is gone
    ├── LlamaCppError         llama.cpp is missing, too old, or a tool of it failed
    ├── PublishError          results are not fit to be published, or the hub did not take them
    ├── ReportError           a report.json or a baseline cannot be read or compared
    ├── TaskError             a zero-shot task or its data cannot be read or run
    └── GateError             validation ran and the file missed a limit

All but UsageError exit with 1. The command line prints the message; `--debug` adds the traceback.
"""


class QronosError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(QronosError):
    exit_code = 2


class CheckpointError(QronosError):
    pass


class CalibrationError(QronosError):
    pass


class TransformError(QronosError):
    pass


class PlanError(QronosError):
    pass


class ArtifactError(QronosError):
    pass


class OutputError(QronosError):
    pass


class OutOfMemoryError(QronosError):
    pass


class RankError(QronosError):
    pass


class LlamaCppError(QronosError):
    pass


class PublishError(QronosError):
    pass


class ReportError(QronosError):
    pass


class TaskError(QronosError):
    pass


class GateError(QronosError):
    pass
