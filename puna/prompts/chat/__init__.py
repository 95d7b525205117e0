"""Chat templates: one file each, called like the template, holding `TEMPLATE`; found because it is there."""
