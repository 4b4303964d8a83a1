"""A prompt's blocks out of the fleet, whoever holds them, and into its node caches: for files that travel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cluster.caches import Caches, Piece, PromptTokens, Sum, names_of
from cluster.dispatch import Dispatcher
from cluster.openai.cache_protocol import ImportRequest, WorkReply
from kvcache.names import NAME_BYTES, TOKEN_BYTES, block_names, split_names
from messages.cache import PIECE_BYTES, BlocksFetched, FetchBlocks, KnownRun, PieceDone, PutBlocks
from messages.errors import CapacityError, KvrayError, RequestError, WorkerError, error_from_info
from messages.fleet import WorkerInfo
from messages.tier import Tier

if TYPE_CHECKING:
    from cluster.prefix_file import PrefixModel, PrefixPiece

_TIMEOUT_S: Final = 60.0  #: of what waits for stores, which have deadlines of their own
_SHOWN: Final = 80  #: characters of what a file says
_NEAREST: Final[tuple[Tier, ...]] = ("host", "device", "disk", "remote")


class Prefix(NamedTuple):
    """Blocks of a prompt that are held, from its head on."""

    model: PrefixModel
    num_blocks: int
    pieces: AsyncIterator[PrefixPiece]


class _Run(NamedTuple):
    """Blocks [begin, end) of a prompt lie there."""

    begin: int
    end: int
    sources: list[tuple[WorkerInfo, Tier]]


class Prefixes:
    """Takes prefixes out of the caches of one fleet, and puts them in. One event loop."""

    def __init__(self, dispatcher: Dispatcher, caches: Caches) -> None:
        self._dispatcher = dispatcher
        self._caches = caches

    # ------------------------------------------------------------------------------------------------------------- out

    async def held(self, prompt: PromptTokens) -> Prefix:
        """Find the longest run of a prompt's blocks, from its head, that one kernel path computed and somebody holds.

        Its pieces are asked for one by one.

        Raises:
            CapacityError: no router is there.
            RequestError: nobody holds the first block (404).
            WorkerError: of a piece: a block is held no more.
        """
        from cluster.prefix_file import PrefixModel  # pyarrow: only who wants it waits for it

        owners = {info.worker_id: info for info in await self._caches.owners(_NEAREST)}
        known = await self._caches.known(prompt)
        found = [
            (kind, path, _runs(runs, owners, path))
            for kind, runs in known.items()
            for path in sorted({info.kernel_path for info in owners.values()})
        ]
        (fingerprint, block_size), path, runs = max(
            found, key=lambda one: _num_blocks(one[2]), default=((b"", 0), "", [])
        )
        if not runs:
            raise RequestError(
                f"prompt: got {len(prompt.token_bytes) // TOKEN_BYTES} tokens of which nobody holds the first block, "
                f"want a prompt that was computed, of at least one block ({block_size} tokens)",
                param="prompt",
                code="not_cached",
                status=404,
            )
        model = PrefixModel(fingerprint, block_size, runs[0].sources[0][0].block_bytes)
        return Prefix(model, _num_blocks(runs), self._pieces(prompt, model, path, runs))

    async def _pieces(
        self, prompt: PromptTokens, model: PrefixModel, kernel_path: str, runs: Sequence[_Run]
    ) -> AsyncIterator[PrefixPiece]:
        from cluster.prefix_file import PrefixPiece

        names = split_names(await names_of(prompt, model.fingerprint, model.block_size))
        plain = await names_of(prompt._replace(salt=b""), model.fingerprint, model.block_size)
        size = max(1, PIECE_BYTES // model.block_bytes)
        token_bytes = model.block_size * TOKEN_BYTES
        for run in runs:
            for begin in range(run.begin, run.end, size):
                end = min(begin + size, run.end)
                blocks, layout_version = await self._fetched(run.sources, names[begin:end], model, kernel_path, begin)
                yield PrefixPiece(
                    layout_version=layout_version,
                    kernel_path=kernel_path,
                    names=plain[begin * NAME_BYTES : end * NAME_BYTES],
                    token_bytes=prompt.token_bytes[begin * token_bytes : end * token_bytes],
                    checksums=b"".join(checksum for checksum, _ in blocks),
                    data=b"".join(data for _, data in blocks),
                )

    async def _fetched(
        self,
        sources: Sequence[tuple[WorkerInfo, Tier]],
        names: Sequence[bytes],
        model: PrefixModel,
        kernel_path: str,
        first_block: int,
    ) -> tuple[list[tuple[bytes, memoryview]], int]:
        """Ask one after the other for what is lacking still; return the blocks' checksums and bytes, and the layout."""
        blocks: dict[bytes, tuple[bytes, memoryview]] = {}
        layouts: set[int] = set()
        failures = ["nobody has it any more"]
        for info, tier in sources:
            lacking = b"".join(name for name in names if name not in blocks)
            if not lacking:
                break
            try:
                question = FetchBlocks(query_id="", tier=tier, names=lacking)
                fetched = await self._dispatcher.ask_owner(info, question, _TIMEOUT_S)
                assert isinstance(fetched, BlocksFetched)
                if fetched.error is not None:
                    raise error_from_info(fetched.error)
            except KvrayError as error:
                failures.append(f"{info.worker_id}: {error.message}")
                continue
            came = split_names(fetched.names)
            if fetched.kernel_path == kernel_path and len(fetched.data) == len(came) * model.block_bytes:
                data, sums = fetched.data, fetched.checksums
                layouts |= {fetched.layout_version} if came else set()
                blocks |= {
                    name: (sums[8 * i : 8 * i + 8], data[i * model.block_bytes :][: model.block_bytes])
                    for i, name in enumerate(came)
                }
        missing = [number for number, name in enumerate(names, first_block) if name not in blocks]
        if missing or len(layouts) != 1:
            number = missing[0] if missing else first_block
            raise WorkerError(f"block {number} of the prompt does not come: {'; '.join(failures)}")
        return [blocks[name] for name in names], layouts.pop()

    # -------------------------------------------------------------------------------------------------------------- in

    async def put(self, piece: ImportRequest, salt: bytes, tenant: int, tiers: Sequence[Tier]) -> WorkReply:
        """Put some blocks of a file into the tiers of each node that serves their model, under names of `salt`.

        `tenant`: whose they are from then on. `tiers`: that may have them, the nearest first.

        Raises:
            CapacityError: no router, or no node cache is there.
            RequestError: they are not blocks of the model that is served, or not whole. None of them is kept.
        """
        caches = await self._caches.found()
        if not caches:
            raise CapacityError("no node cache is there to take blocks in", status=503, code="no_node_cache")
        fitting = [info for info in caches if not _differences(piece, info)]
        if not fitting:
            message = f"blocks of another model: {_differences(piece, caches[0])}"
            raise RequestError(message, param="fingerprint", code="other_model")
        names = await asyncio.to_thread(_names_for, piece, salt)
        question = PutBlocks(
            query_id="",
            fingerprint=piece.fingerprint,
            layout_version=piece.layout_version,
            kernel_path=piece.kernel_path,
            first_index=piece.first_block,
            block_size=piece.block_size,
            names=names,
            checksums=piece.checksums,
            data=piece.data,
            tenant=tenant,
            tiers=tuple(tiers),
        )
        total = Sum(fitting)
        asked = [self._dispatcher.ask_owner(info, question, _TIMEOUT_S) for info in fitting]
        for info, answer in zip(fitting, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(answer, KvrayError):
                total.add(Piece(info, tiers[0], failure=answer.message))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                assert isinstance(answer, PieceDone)
                error = None if answer.error is None else error_from_info(answer.error)
                if isinstance(error, RequestError):
                    raise error
                total.add(Piece(info, tiers[0], answer, None if error is None else error.message))
        return total.reply()


def _runs(known: Sequence[KnownRun], owners: dict[str, WorkerInfo], kernel_path: str) -> list[_Run]:
    """Return who has which blocks that this kernel path computed, nearest first, up to the first that nobody has."""
    runs: list[_Run] = []
    for begin, end, holders in ((run.begin, run.end, run.holders) for run in known):
        sources = [(owners[one.worker_id], one.tier) for one in holders if one.worker_id in owners]
        sources = [source for source in sources if source[0].kernel_path == kernel_path]
        if not sources or begin != _num_blocks(runs):
            break
        runs.append(_Run(begin, end, sorted(sources, key=lambda source: _NEAREST.index(source[1]))))
    return runs


def _num_blocks(runs: Sequence[_Run]) -> int:
    return runs[-1].end if runs else 0


def _differences(piece: ImportRequest, info: WorkerInfo) -> str:
    """Say in what blocks differ from those of a node cache; "": in nothing."""
    pairs: list[tuple[str, object, object]] = [
        ("fingerprint", piece.fingerprint.hex(), info.fingerprint.hex()),
        ("kernel path", piece.kernel_path, info.kernel_path),
        ("tokens in a block", piece.block_size, info.block_size),
        ("bytes in a block", piece.block_bytes, info.block_bytes),
    ]
    return "; ".join(f"{what} {str(seen)[:_SHOWN]}, wanted {wanted}" for what, seen, wanted in pairs if seen != wanted)


def _names_for(piece: ImportRequest, salt: bytes) -> bytes:
    """Name the blocks here; the names that came with them tell that the tokens are theirs.

    Raises:
        RequestError: they are not.
    """
    count = len(piece.names) // NAME_BYTES
    num_bytes = (piece.first_block + count) * piece.block_size * TOKEN_BYTES
    if piece.first_block < 0 or len(piece.token_bytes) != num_bytes or len(piece.names) != count * NAME_BYTES:
        raise RequestError(
            f"token_bytes: got {len(piece.token_bytes)} bytes for the blocks {piece.first_block} to "
            f"{piece.first_block + count}, want {num_bytes}, {TOKEN_BYTES} for each token from the prompt's first on",
            param="token_bytes",
        )
    begin = piece.first_block * NAME_BYTES
    plain = block_names(piece.fingerprint, b"", piece.token_bytes, piece.block_size)
    if plain[begin:] != piece.names:
        raise RequestError("names: they are not those of the tokens", param="names", code="altered")
    return block_names(piece.fingerprint, salt, piece.token_bytes, piece.block_size)[begin:]
