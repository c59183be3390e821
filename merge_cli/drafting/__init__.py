"""Writing a first recipe for some models (`merge-cli init`)."""
