"""Running models on tasks (`merge-cli evaluate`): data, tasks, metrics, gates, caches."""
