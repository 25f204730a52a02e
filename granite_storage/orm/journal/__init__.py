"""The journal: crash safety for attachments, in the application's own database."""
