"""Real data and small published models, fetched from package registries at pinned versions and made into files."""
