"""The published metrics, with the quirks that their digits depend on."""
