"""What the processes of the crash tests need, imported once by their server."""

import transformers.models.auto.tokenization_auto  # noqa: F401
import transformers.tokenization_utils_tokenizers  # noqa: F401

import kdata.packed
import kdata.teachers.reduce
import tests.fakes  # noqa: F401
