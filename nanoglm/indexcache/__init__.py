"""The pattern lab: which layers can do without an indexer (indexcache spec)."""
