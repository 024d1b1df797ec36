"""What wraps every delivery and every publish: `base` says how; the rest are msgbus's own."""

from msgbus.middleware.base import Middleware as Middleware
