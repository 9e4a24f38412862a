#!/usr/bin/env python3
# patch-nsm.py SRC_ROOT : lets QEMU's NSM sign with a test key. Own code; QEMU's text is only matched by short anchors.
import sys
p = sys.argv[1] + '/hw/virtio/virtio-nsm.c'; s = open(p).read()
def sub(old, new, frm=0):
    global s
    i = s.index(old, frm); s = s[:i] + new + s[i + len(old):]; return i
sub('#define NSM_REQUEST_MAX_SIZE ', '#include <gnutls/gnutls.h>\n#include <gnutls/abstract.h>\n#include <gnutls/crypto.h>\n\n#define NSM_REQUEST_MAX_SIZE ')
sub('    cbor_set_uint8(value, 0);', '    cbor_set_uint8(value, getenv("NSM_TEST_KEY") ? 34 : 0);', s.index('static bool add_protected_header_to_cose'))  # -35 = ES384
a = s.index('    value_cbor = cbor_new_definite_array(1);'); b = s.index('    if (!qemu_cbor_map_add(map, key_cbor, value_cbor)) {', a)
s = s[:a] + """    if (getenv("NSM_TEST_CABUNDLE")) {
        g_auto(GStrv) v = g_strsplit(getenv("NSM_TEST_CABUNDLE"), ":", -1);
        value_cbor = cbor_new_definite_array(g_strv_length(v));
        for (int i = 0; v[i]; i++) {
            g_autofree gchar *d = NULL;
            gsize l;
            if (!g_file_get_contents(v[i], &d, &l, NULL)) {
                goto cleanup;
            }
            bs = cbor_build_bytestring((uint8_t *)d, l);
            if (!bs || !qemu_cbor_array_push(value_cbor, bs)) {
                goto cleanup;
            }
        }
    } else {
        value_cbor = cbor_new_definite_array(1);
        bs = cbor_build_bytestring(zero, 64);
        if (!bs || !qemu_cbor_array_push(value_cbor, bs)) {
            goto cleanup;
        }
    }
""" + s[b:]
sub('    if (!qemu_cbor_add_bytestring_to_map(root, "certificate", zero, 64)) {', """    if (getenv("NSM_TEST_CERT")) {
        g_autofree gchar *d = NULL;
        gsize l;
        if (!g_file_get_contents(getenv("NSM_TEST_CERT"), &d, &l, NULL) ||
            !qemu_cbor_add_bytestring_to_map(root, "certificate", (uint8_t *)d, l)) {
            goto cleanup;
        }
    } else if (!qemu_cbor_add_bytestring_to_map(root, "certificate", zero, 64)) {""")
h = 'static bool add_signature_to_cose(cbor_item_t *cose)'
i = sub(h, """/* COSE_Sign1 ES384 over ["Signature1", protected, h'', payload] */
static bool nsm_test_sign(cbor_item_t *cose, uint8_t out[96])
{
    g_autofree gchar *pem = NULL;
    gsize l;
    bool ok = false;
    unsigned char *tbs = NULL;
    size_t tbs_size = 0, tbs_len;
    gnutls_privkey_t k = NULL;
    gnutls_datum_t kd, td, sig = { 0 }, r = { 0 }, s = { 0 };
    cbor_item_t *p0 = cbor_array_get(cose, 0), *p2 = cbor_array_get(cose, 2);
    cbor_item_t *a = cbor_new_definite_array(4);
    cbor_item_t *it[4] = {
        cbor_build_string("Signature1"),
        cbor_build_bytestring(cbor_bytestring_handle(p0), cbor_bytestring_length(p0)),
        cbor_build_bytestring((uint8_t *)"", 0),
        cbor_build_bytestring(cbor_bytestring_handle(p2), cbor_bytestring_length(p2)),
    };
    for (int i = 0; i < 4; i++) {
        if (!cbor_array_push(a, it[i])) {
            return false;
        }
        cbor_decref(&it[i]);
    }
    tbs_len = cbor_serialize_alloc(a, &tbs, &tbs_size);
    if (!g_file_get_contents(getenv("NSM_TEST_KEY"), &pem, &l, NULL)) {
        goto out;
    }
    kd.data = (unsigned char *)pem; kd.size = l;
    td.data = tbs; td.size = tbs_len;
    if (gnutls_privkey_init(&k) < 0 ||
        gnutls_privkey_import_x509_raw(k, &kd, GNUTLS_X509_FMT_PEM, NULL, 0) < 0 ||
        gnutls_privkey_sign_data(k, GNUTLS_DIG_SHA384, 0, &td, &sig) < 0 ||
        gnutls_decode_rs_value(&sig, &r, &s) < 0) {
        goto out;
    }
    memset(out, 0, 96);
    for (int i = 0; i < 2; i++) {
        gnutls_datum_t *v = i ? &s : &r;
        unsigned int skip = v->size > 48 ? v->size - 48 : 0;
        memcpy(out + 48 * i + 48 - (v->size - skip), v->data + skip, v->size - skip);
    }
    ok = true;
 out:
    if (k) {
        gnutls_privkey_deinit(k);
    }
    gnutls_free(sig.data); gnutls_free(r.data); gnutls_free(s.data);
    free(tbs);
    cbor_decref(&a); cbor_decref(&p0); cbor_decref(&p2);
    return ok;
}

""" + h)
i = s.index(h, i)
sub('uint8_t zero[64] = {0};', """uint8_t zero[96] = {0};
    size_t siglen = 64;

    if (getenv("NSM_TEST_KEY")) {
        if (!nsm_test_sign(cose, zero)) {
            goto cleanup;
        }
        siglen = 96;
    }""", i)
sub('cbor_build_bytestring(zero, 64)', 'cbor_build_bytestring(zero, siglen)', i)
open(p, 'w').write(s)
