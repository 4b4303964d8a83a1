"""Commands that make parts of the project, and are no part of the product."""
