"""What a chat template may take."""

from __future__ import annotations

SECONDS = 5.0  # of processor time for one rendering; the slowest in the wild take milliseconds
MAX_MEMORY = 1536 * 2**20  # of address space, of which Python and transformers take 200 MiB
MAX_BYTES = 64 * 2**20  # of a rendered conversation
