"""`merge-cli demo`: a family of tiny models inside the package, merged and measured in seconds."""
