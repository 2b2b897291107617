#!/bin/sh
# Starts HAProxy for Ray Serve, with six changes to the file that Ray writes:
# - Metrics and statistics listen on loopback (Ray's template binds them to all interfaces).
# - A request that does not arrive completely within ten seconds occupies no replica.
# - Requests above the limit of the replicas are refused here, where a refusal is cheap.
# - Serve's refusals are problem documents.
# - HAProxy's own errors are problem documents.
# - A read of a replica that died is retried on another one. Writes are not: only the client knows whether a repetition is a duplicate.
# RECRAY_HAPROXY: the binary. RECRAY_PLACES: requests that this HAProxy gives to a replica, served or queued (unset: Serve's limit).
# Arguments: Serve's, -f CONFIG among them.
no_retry='http-request disable-l7-retry unless { path_end /v1/recommend /v1/score /v1/history /v1/similar /v1/models /healthz /readyz }'
defaults="option http-buffer-request\n    timeout http-request 10s\n    timeout http-keep-alive 3600s\n"
add_error() { # status, title, detail, fix, headers
    defaults="$defaults    http-error status $1 content-type application/problem+json $5string \
'{\"title\": \"$2\", \"status\": $1, \"detail\": \"$3\", \"fix\": \"$4\", \"errors\": []}'\n"
}
add_error 400 'Bad Request' 'this is not an HTTP request' 'see /docs'
add_error 408 'Request Timeout' 'the request did not arrive completely' 'send it at once'
add_error 413 'Content Too Large' 'the head of the request is too large' 'send less'
add_error 500 'Internal Server Error' 'the endpoint failed' 'see its log'
add_error 502 'Bad Gateway' 'a replica failed during the request' 'retry later' 'hdr Retry-After 1 '
add_error 503 'Service Unavailable' 'no replica accepts requests now' 'retry later' 'hdr Retry-After 1 '
add_error 504 'Gateway Timeout' 'a replica did not respond in time' 'retry later' 'hdr Retry-After 1 '
busy='"title": "Service Unavailable", "status": 503, "fix": "retry later", "errors": []'
busy="return status 503 content-type application/problem+json hdr Retry-After 1 string '{$busy"
serve_refusal="http-response $busy, \"detail\": \"too many requests wait\"}' if { status 503 } { res.hdr(content-type) -m beg text/plain }"
limit="http-request set-var(txn.places) nbsrv,mul(${RECRAY_PLACES:-4096})\n    http-request $busy, \"detail\": \"all replicas are at their limit\"}' \
if { nbsrv gt 0 } { be_conn,sub(txn.places) gt 0 } !{ path /healthz /readyz }"
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -e '/^frontend prometheus/,/^frontend http/s/bind :/bind 127.0.0.1:/' -e '/^listen stats/,$s/bind \*:/bind 127.0.0.1:/' \
            -e 's/^\( *retry-on\) conn-failure$/\1 conn-failure empty-response/' -e '/^ *errorfile /d' \
            -e "/^defaults/a\\    $defaults" \
            -e "/^frontend http_frontend/a\\    $no_retry\\n    $serve_refusal" -e "/^backend http-recray$/a\\    $limit" "$argument"
    fi
    previous=$argument
done
exec "$RECRAY_HAPROXY" "$@"
