#!/bin/sh
# HAProxy as Ray Serve starts it, but with its metrics and statistics on loopback: Ray's template binds them to all interfaces.
# RECRAY_HAPROXY: the binary itself. Arguments: Serve's, -f CONFIG among them.
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' -e '/^listen stats/,$s/bind \*:/bind 127.0.0.1:/' "$argument"
    fi
    previous=$argument
done
exec "$RECRAY_HAPROXY" "$@"
