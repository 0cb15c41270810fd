"""The delta: trained values and their places, applied to a base model and taken off again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from selectune.delta import hub
from selectune.delta.file import format as layout
from selectune.delta.file.content import Content
from selectune.delta.live import apply as live
from selectune.delta.live.verify import Report, verify
from selectune.errors import ConfigError, DeltaError, DeltaFormatError
from selectune.files import make_folder, read_owned, write_durably

DELTA_FILE = hub.FILE
"""Name of the delta's file in a directory."""

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".distcp"}


class Delta(Content):
    """Values of some scalars of a model: applied to the base, reverted bit for bit, shipped as one file.

    `patches` (scattered scalars) and `dense` (whole tensors) are copied. `info` needs `info["base"]` from
    `base_info(base_model)`; the other keys have defaults. Patches without scalars are dropped, unless they are zeroed.

    Raises DeltaError for parts that do not fit each other, NonFiniteError for NaN or infinity among the
    values, DeltaFormatError for an `info` outside the schema (docs/delta-format.md).
    """

    _origin: str | None = None

    @property
    def origin(self) -> str | None:
        """The repository and commit that the delta was loaded from, `org/name@commit`; None if not from the hub."""
        return self._origin

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file durably: `path` itself if it ends in .safetensors, else `path`/delta.safetensors.

        After it returned the file survives a crash; if it raises DeltaError, the earlier file is still there. Only a
        delta is replaced: DeltaError if there is a file of anything else, such as the weights of a model.
        """
        path = file_of(path)
        if path.is_file() and not _may_go(path):
            raise DeltaError(
                f"{path} is there and is no delta; only a delta is overwritten. Give another file, or remove this one"
            )
        try:
            make_folder(path.parent)
        except (OSError, ValueError) as error:  # the latter of a NUL, say
            why = getattr(error, "strerror", None) or error
            raise DeltaError(f"cannot make the directory {str(path.parent)!a}: {why}") from error
        return write_durably(path, self.to_bytes())

    def apply(self, model: nn.Module, stack: bool = False, full: bool = False) -> None:
        """Write the values into the model, in place: all of them or, on any error, none.

        The model must be the delta's base: same tensors, and the same bits wherever the delta writes; with
        `full`, the same bits everywhere (reads all weights). A tensor that no checkpoint held (a fresh head) and that
        the delta stores whole may hold anything; `revert` puts that back. `stack=True` allows it on top of other
        applied deltas; it then fits the base under them or, if it was trained on top of them, the model as it is.

        Raises BaseMismatchError for another model, DeltaStateError if a tuner is attached, this delta is
        applied already, or another one is (to the model, or to one that shares weights with it: a part, a whole, tied
        weights) and `stack` is False, or if this thread is inside a shelf's `using` block. Other threads take turns.
        """
        live.apply(self, model, stack, full)

    def revert(self, model: nn.Module) -> None:
        """Take the delta off again: every bit is as it was before `apply`.

        It must be the last one applied. A delta that carries old values can also be reverted where it was
        merged, or applied in another process, as long as the model holds exactly its values.

        Raises DeltaStateError if it is not applied, is not the last one, or the model changed since.
        """
        live.revert(self, model)

    def merge(self, model: nn.Module) -> None:
        """Apply and forget: the values become the model's own. If it is applied, it is only forgotten.

        Raises as `apply` does, and DeltaStateError where other deltas are applied.
        """
        live.merge(self, model)

    def applied(self, model: nn.Module, stack: bool = False) -> AbstractContextManager[nn.Module]:
        """Apply for the length of a `with` block, and revert after it, also when the block raises.

        Other threads that want to change the model or to read it through a shelf's door wait until the block ends, so
        the block computes with this delta only. Raises as `apply` and `revert` do.
        """
        return live.applied(self, model, stack)

    def verify(self, model: nn.Module, full: bool = False) -> Report:
        """Prove on a bare base model that the delta changes its support only, and leave the model as it was.

        It reads all weights twice; `full` also compares them with the recorded digest of the base. A wrong base is
        reported (`report.ok`, `report.problem`), not raised. Raises DeltaStateError if a tuner or another delta is on
        the model, or if `full` is asked of a delta without that digest; IntegrityError if the model could not be put
        back.
        """
        return verify(self, model, full=full)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        message: str | None = None,
        license: str | None = None,
        metrics: Mapping[str, float] | None = None,
        commands: Sequence[str] = (),
        dry_run: bool = False,
    ) -> hub.Upload:
        """Write the delta and a model card into the repository `org/name` of the Hugging Face hub, in one commit.

        The repository is made if it is missing; `private` says how, and by default the hub does. A branch `revision` is
        made too. A README.md that is there is replaced by the card, which is made from the delta's record, `license`,
        `metrics` and the `commands` of the run. `dry_run` returns what would be sent, and sends nothing. `token`: by
        default the one of `hf auth login` or HF_TOKEN.

        Raises ConfigError for a name that is not `org/name`, HubError if the hub refuses or cannot be reached.
        """
        return hub.push(
            self, repo, private, revision, token, message, license, metrics, commands, dry_run
        )  # fmt: skip


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file that a delta saved to this path is in."""
    path = Path(path)
    return path / DELTA_FILE if path.suffix != ".safetensors" or path.is_dir() else path


def _may_go(path: Path) -> bool:
    """Whether a file is a delta by its header, though perhaps a damaged one, or empty, or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            return not head or layout.FORMAT.encode() in file.read(min(int.from_bytes(head, "little"), layout.HEAD))
    except OSError:
        return True  # to write is refused as well, or the error says why


def load(path: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Delta:
    """Read a delta from its file, from a directory that holds delta.safetensors, or from the Hugging Face hub.

    A text `org/name` or `org/name@revision` that is no file or folder here is a repository on the hub; if there is a
    folder `org` here, only with a revision. `revision`: a branch, tag or commit of it; `Delta.origin` says which commit
    it was. The file is read once into memory and its digests are compared; nothing in it is run and no other file is
    opened.

    Raises DeltaError if there is none, HubError if the hub does not give it, DeltaFormatError if it is anything but an
    intact delta.
    """
    given, path, origin = path, Path(path), None
    named = revision is not None or "@" in str(given)
    if hub.is_repo(given) and not path.exists() and path.parent.is_dir() and not named:
        raise DeltaError(
            f"{path} does not exist, though its folder {path.parent} does. If it names a repository of the hub, add a "
            f"revision: {given}@main."
        )
    if hub.is_repo(given) and not path.exists():
        path = hub.fetched(str(given), revision, token)
        origin = f"{str(given).partition('@')[0]}@{path.parent.name}"
    elif revision is not None:
        raise ConfigError(f"revision={revision} is for deltas on the hub, written org/name; {given} is none.")
    if path.is_dir():
        if not (path / DELTA_FILE).exists():
            raise DeltaError(f"{path} holds no {DELTA_FILE}; expected a directory that selectune saved a delta to")
        path = path / DELTA_FILE
    if path.suffix in _PICKLES:
        raise DeltaFormatError(f"{path} is a pickle by its name; selectune never opens those. Expected *.safetensors")
    try:
        delta = Delta.from_bytes(read_owned(path, head=(layout.HEAD, layout.check_head)))
    except DeltaFormatError as error:
        where = f"{path}: " if str(path) not in str(error) else ""
        again = "" if origin is None else ". It came from the hub: remove this file and load it again"
        if not where and not again:
            raise
        raise DeltaFormatError(f"{where}{error}{again}") from error
    delta._origin = origin
    return delta
