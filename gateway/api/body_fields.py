"""Body fields that reach beyond their own request: which ones a client may send.

Engines accept many fields that OpenAI's API does not have. Those in `GUARDED_FIELDS` change the treatment of other
requests, reach into the engine, or carry data that the engine decodes with its own rights. By default the gateway
removes them; ``server.body_fields`` and a key's ``allowed_fields`` let them pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError, bad_request

log = logging.getLogger("antares.body_fields")

SALT_FIELD = "cache_salt"

_PROMPT_FIELDS = frozenset(("prompt_embeds", "input_embeds"))
"""Guarded fields that hold the prompt itself. If denied, they get 400: without them the prompt would be another one."""

GUARDED_FIELDS = _PROMPT_FIELDS | {
    # vLLM: order of the queue, data-parallel rank, KV and encoder cache transfer, identity of requests and sessions.
    "priority",
    "data_parallel_rank",
    "kv_transfer_params",
    "ec_transfer_params",
    "kv_cache_report_mode",
    "request_id",
    "session_id",
    SALT_FIELD,
    "logits_processors",
    # SGLang: the same, and Python code that the server unpickles.
    "rid",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "session_params",
    "extra_key",
    "lora_path",
    "custom_logit_processor",
    # TensorRT-LLM, llama.cpp, LMDeploy: the same.
    "disaggregated_params",
    "lora_request",
    "id_slot",
    "slot_id",
    "migration_request",
    # Dynamo: priority and routing hints. The gateway itself reads the length hint from it.
    "nvext",
}
"""Fields that a client may send only if the configuration allows them."""

DEFAULT_ALLOWED = (SALT_FIELD,)
"""``cache_salt`` only separates a client's prefix cache from that of others, and the gateway scopes it by tenant."""

_XARGS = "vllm_xargs"


@dataclass(frozen=True, slots=True)
class FieldGuard:
    """Applies the rights of a key to the fields of a body.

    Attributes:
        rejects: a denied field gets 400 and is not removed.
        isolates_prefixes: a request without a cache salt gets one of its tenant.
    """

    rejects: bool = False
    isolates_prefixes: bool = False

    def apply(self, document: dict[str, Any], key: ApiKey) -> bool:
        """Remove what ``key`` may not send from ``document``, and scope its cache salt. Returns whether it changed.

        Members of ``vllm_xargs`` with a guarded name are treated alike: vLLM reads some fields from there too.
        Raises `ApiError` 400 for a denied field that may not be removed, and for a malformed ``cache_salt``.
        """
        xargs = document.get(_XARGS)
        nested: dict[str, Any] = {}
        if isinstance(xargs, dict) and not GUARDED_FIELDS.isdisjoint(xargs):
            nested = xargs
        if not nested and GUARDED_FIELDS.isdisjoint(document):
            return self._scope_salt(document, key)
        denied = self._denied(document, key)
        for name in denied:
            del document[name]
        if nested:
            denied_xargs = self._denied(nested, key, f"{_XARGS}.")
            document[_XARGS] = {name: value for name, value in nested.items() if name not in denied_xargs}
        return self._scope_salt(document, key) or bool(denied or nested)

    def _scope_salt(self, document: dict[str, Any], key: ApiKey) -> bool:
        """Scope the cache salt by tenant, or add one if prefixes are isolated. Returns whether it changed."""
        salt = document.get(SALT_FIELD)
        if key.sha256 == "" or (salt is None and not self.isolates_prefixes):
            return False
        # No client's own salt becomes this one, because it is not empty.
        document[SALT_FIELD] = f"{key.tenant}:" if salt is None else scoped_salt(salt, key.tenant)
        return True

    def check_form(self, names: Iterable[str], key: ApiKey) -> None:
        """Raise `ApiError` 400 for a form with a field that ``key`` may not send. A form is never changed."""
        for name in names:
            salted = name == SALT_FIELD and key.sha256 != ""
            if salted or (name in GUARDED_FIELDS and name not in key.allowed_fields):
                raise _denied_error(name, "in a form ")

    def _denied(self, fields: dict[str, Any], key: ApiKey, prefix: str = "") -> list[str]:
        """Return the names in ``fields`` that must be removed. Raises `ApiError` 400 if one may not be."""
        denied = [name for name in fields if name in GUARDED_FIELDS and name not in key.allowed_fields]
        for name in denied:
            # A client sends `nvext` for its length hint, so that alone is no reason to reject.
            if name in _PROMPT_FIELDS or (self.rejects and name != "nvext"):
                raise _denied_error(prefix + name)
            log.debug("removed the body field %s%s of tenant %s", prefix, name, key.tenant)
        return denied


def scoped_salt(salt: Any, tenant: str) -> str:
    """Return ``salt`` with the tenant's name in front. A tenant's name has no colon, so tenants never share a salt.

    Raises `ApiError` 400 for a salt that is not a non-empty string.
    """
    if not isinstance(salt, str) or not salt:
        raise bad_request("cache_salt: must be a non-empty string.", SALT_FIELD, "invalid_type")
    return f"{tenant}:{salt}"


def _denied_error(name: str, where: str = "") -> ApiError:
    return bad_request(
        f"{name}: this API key may not send the field {where}to an engine. The gateway's operator can allow it.",
        name,
        "unsupported_parameter",
    )
