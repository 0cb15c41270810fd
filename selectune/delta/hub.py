"""Deltas on the Hugging Face hub: pushed with a model card, and fetched at a commit."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from selectune.delta.card import card
from selectune.delta.file.content import Content
from selectune.errors import ConfigError, HubError

FILE = "delta.safetensors"
CARD = "README.md"

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Upload:
    """What a push writes: `files` with their sizes and SHA-256, the text of the card, and the commit once it is made.

    `commit` is None if nothing was sent. `path`: the folder of the base that the file names, which readers will see.
    """

    repo: str
    endpoint: str
    revision: str
    private: bool | None
    message: str
    files: Mapping[str, tuple[int, str]]
    card: str
    path: str | None
    commit: str | None = None


def is_repo(name: object) -> bool:
    """Whether a text could be a repository on the hub, `org/name` or `org/name@revision`.

    >>> is_repo("org/name"), is_repo("org/name@v1"), is_repo("./runs/rte"), is_repo("runs/rte.safetensors")
    (True, True, False, False)
    """
    repo = str(name).partition("@")[0]
    return isinstance(name, str) and _REPO.fullmatch(repo) is not None and not repo.endswith(_FILES)


def fetched(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """The delta's file of a repository, in the hub's cache; its folder is named by the commit.

    Offline, the file that was fetched last is taken. Raises HubError.
    """
    repo, _, at = name.partition("@")
    if at and revision not in (None, at):
        raise ConfigError(f"{name} names the revision {at}, and revision={revision} another; give one of them.")
    hub = _hub(f"{name} is no file or folder here, and to fetch it")
    with _explained(f"{name} is no file or folder here nor in the hub's cache, and", repo, at or revision):
        return Path(hub.HfApi(token=token).hf_hub_download(repo, FILE, revision=at or revision))


def push(
    delta: Content,
    repo: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
    commands: Sequence[str] = (),
    dry_run: bool = False,
) -> Upload:
    """See `Delta.push_to_hub`."""
    if not is_repo(repo) or "@" in repo:
        raise ConfigError(f"A repository on the hub is written org/name; got {repo!r}.")
    hub = _hub("To push a delta")
    content = {CARD: card(delta, repo, metrics, commands, license).encode(), FILE: delta.to_bytes()}
    made = Upload(
        repo,
        import_module("huggingface_hub.constants").ENDPOINT,
        revision or "main",
        private,
        message or f"Upload {delta.label}",
        {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()},
        content[CARD].decode(),
        delta.info.get("model", {}).get("path"),
    )
    if dry_run:
        return made
    with _explained("The delta was not pushed:", repo, revision):
        api = hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        added = [hub.CommitOperationAdd(name, data) for name, data in content.items()]
        commit = api.create_commit(repo, added, commit_message=made.message, revision=revision)
        return replace(made, commit=commit.oid)


def _hub(what: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise HubError(f"{what} the package `huggingface_hub` is needed: pip install 'selectune[hub]'.") from error


@contextmanager
def _explained(what: str, repo: str, revision: str | None) -> Iterator[None]:
    """Within it, an error of huggingface_hub becomes one sentence after `what`, and its log is silent."""
    errors, log = import_module("huggingface_hub.errors"), logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except errors.GatedRepoError as error:
        why = f"access to {repo} must be asked for on its page on the hub, by the account of the token"
        raise HubError(f"{what} {why}.") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what} the repository {repo} on the hub has no revision {revision}.") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{what} the repository {repo} on the hub holds no {FILE}, so it is no delta.") from error
    except errors.RepositoryNotFoundError as error:
        why = f"the hub shows no repository {repo}: it does not exist, or it is private and the token may not read it"
        raise HubError(f"{what} {why} (log in with `hf auth login`, or set HF_TOKEN).") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{what} {_refused(error.response.status_code, repo)}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        answered = error.__cause__
        if isinstance(answered, errors.HfHubHTTPError):
            raise HubError(f"{what} {_refused(answered.response.status_code, repo)}.") from error
        off = import_module("huggingface_hub.constants").HF_HUB_OFFLINE
        why = "the hub is switched off (HF_HUB_OFFLINE=1)" if off else "the hub cannot be reached"
        raise HubError(f"{what} {why}.") from error
    except (OSError, ValueError) as error:  # a download of another length, a name or a licence that the hub refuses
        raise HubError(f"{what} {' '.join(str(error).split())[:300]}") from error
    finally:
        log.setLevel(level)


def _refused(status: int, repo: str) -> str:
    if status in (401, 403):
        return (
            f"the hub refuses this for {repo} ({status}): there is no token, or it is wrong or may not do that (log in "
            "with `hf auth login`, or set HF_TOKEN)"
        )
    return f"the hub answers {status} for {repo}; try again later" if status >= 500 else f"the hub answers {status}"
