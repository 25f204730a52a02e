"""Integrations with web frameworks and admin panels."""
