// The published JavaScript SDK against a running agent and node. Environment and purpose: see ../python/check.py.

import assert from 'node:assert/strict'
import { createDecipheriv, createHash, createPrivateKey, createPublicKey, diffieHellman, X509Certificate } from 'node:crypto'
import { readFileSync } from 'node:fs'
import https from 'node:https'
import { secp256k1 } from '@noble/curves/secp256k1'
import { ed25519 } from '@noble/curves/ed25519'
import { keccak_256 } from '@noble/hashes/sha3'
import { DstackClient, TappdClient, getComposeHash, verifyEnvEncryptPublicKey, verifyEnvEncryptPublicKeyLegacy } from '@phala/dstack-sdk'
import { encryptEnvVars } from '@phala/dstack-sdk/encrypt-env-vars'
import { toViemAccountSecure } from '@phala/dstack-sdk/viem'

const CALLS = 64
const env = (name) => process.env[name] || assert.fail(`${name} is not set`)
const said = (text) => console.log(`js      ${text}`)
const hex = (bytes) => Buffer.from(bytes).toString('hex')
const [appId, identity] = [env('CONFORMANCE_APP_ID'), env('CONFORMANCE_ID_PUB')]
const client = new DstackClient()
console.warn = () => {} // deprecation notes of the SDK

function recover(digest, signature) {
  assert.equal(signature.length, 65)
  return hex(secp256k1.Signature.fromCompact(signature.slice(0, 64)).addRecoveryBit(signature[64]).recoverPublicKey(digest).toRawBytes(true))
}

/** Guest API reference §8: claim, app key, identity key of the cluster. */
function chainToIdentity(claim, chain) {
  const appKey = recover(keccak_256(claim), chain[0])
  const issued = Buffer.concat([Buffer.from('dstack-kms-issued:'), Buffer.from(appId, 'hex'), Buffer.from(appKey, 'hex')])
  assert.equal(recover(keccak_256(issued), chain[1]), identity)
}

async function refuses(what, call) {
  await assert.rejects(call, undefined, `${what} was answered`)
  said(`refused as it should be: ${what}`)
}

function post(path, body) {
  const url = new URL(path, env('CONFORMANCE_KMS_URL'))
  return new Promise((resolve, reject) => {
    const request = https.request(url, { method: 'POST', ca: readFileSync(env('CONFORMANCE_ROOT_CA')), timeout: 20000 }, (answer) => {
      let text = ''
      answer.on('data', (chunk) => (text += chunk))
      answer.on('end', () => (answer.statusCode === 200 ? resolve(JSON.parse(text)) : reject(new Error(`${answer.statusCode} ${text}`))))
    })
    request.on('error', reject)
    request.end(JSON.stringify(body))
  })
}

const info = await client.info()
assert.equal(info.app_id, appId)
assert.equal(info.compose_hash, createHash('sha256').update(info.tcb_info.app_compose).digest('hex'))
assert.ok(await client.isReachable())
assert.equal(getComposeHash({ b: 1, a: [2] }), createHash('sha256').update('{"a":[2],"b":1}').digest('hex'))
said(`info app_id=${info.app_id} version=${(await client.version()).version}`)

const key = await client.getKey('wallet/eth', 'mainnet')
assert.deepEqual(key.key, (await client.getKey('wallet/eth', 'other')).key)
chainToIdentity(Buffer.from(`mainnet:${hex(secp256k1.getPublicKey(key.key, true))}`), key.signature_chain)
const edwards = await client.getKey('wallet/eth', 'mainnet', 'ed25519')
chainToIdentity(Buffer.from(`mainnet:${hex(ed25519.getPublicKey(edwards.key))}`), edwards.signature_chain)
assert.match(toViemAccountSecure(key).address, /^0x[0-9a-fA-F]{40}$/)
said('getKey on both curves; both chains end at the identity key')

const quote = await client.getQuote('report data of js')
assert.ok(quote.quote.includes(hex('report data of js')))
assert.equal(quote.replayRtmrs()[3], info.tcb_info.rtmr3)
assert.ok((await client.attest('report data of js')).attestation.length > 1000)
await refuses('65 bytes of report data', () => client.getQuote('x'.repeat(65)))
said('getQuote, attest; the log replays to RTMR3')

for (const algorithm of ['ed25519', 'secp256k1']) {
  const signed = await client.sign(algorithm, 'a message')
  const valid =
    algorithm === 'ed25519'
      ? ed25519.verify(signed.signature, Buffer.from('a message'), signed.public_key)
      : secp256k1.verify(signed.signature, createHash('sha256').update('a message').digest(), signed.public_key)
  assert.ok(valid)
  chainToIdentity(Buffer.from(`signing:${hex(signed.public_key)}`), signed.signature_chain.slice(1))
  assert.ok((await client.verify(algorithm, 'a message', signed.signature, signed.public_key)).valid)
  assert.ok(!(await client.verify(algorithm, 'another', signed.signature, signed.public_key)).valid)
}
await refuses('sign with an unknown algorithm', () => client.sign('rsa', 'a message'))
said('sign, verify; the chains end at the identity key')

const tls = await client.getTlsKey({ subject: 'js.example', altNames: ['js.example'], usageRaTls: true, usageClientAuth: true, withAppInfo: true })
const [leaf, appCa, root] = tls.certificate_chain.map((pem) => new X509Certificate(pem))
assert.ok(leaf.verify(appCa.publicKey) && appCa.verify(root.publicKey) && root.verify(root.publicKey))
assert.ok(leaf.checkPrivateKey(createPrivateKey(tls.key)) && leaf.checkHost('js.example'))
assert.equal(root.fingerprint256, new X509Certificate(readFileSync(env('CONFORMANCE_ROOT_CA'))).fingerprint256)
assert.ok(tls.asUint8Array(32).length === 32)
said('getTlsKey; the chain ends at the root')

const answer = await post('/prpc/GetAppEnvEncryptPubKey?json', { app_id: appId })
const publicKey = Buffer.from(answer.public_key, 'hex')
assert.equal(verifyEnvEncryptPublicKey(publicKey, Buffer.from(answer.signature_v1, 'hex'), appId, answer.timestamp), `0x${identity}`)
assert.equal(verifyEnvEncryptPublicKeyLegacy(publicKey, Buffer.from(answer.signature, 'hex'), appId), `0x${identity}`)
const sealed = Buffer.from(await encryptEnvVars([{ key: 'SECRET', value: 'of js' }], answer.public_key), 'hex')
const secret = Buffer.from(JSON.parse(readFileSync(env('CONFORMANCE_APP_KEYS'))).env_crypt_key, 'hex')
const der = (prefix, bytes) => Buffer.concat([Buffer.from(prefix, 'hex'), bytes])
const shared = diffieHellman({
  privateKey: createPrivateKey({ key: der('302e020100300506032b656e04220420', secret), format: 'der', type: 'pkcs8' }),
  publicKey: createPublicKey({ key: der('302a300506032b656e032100', sealed.subarray(0, 32)), format: 'der', type: 'spki' }),
})
const decipher = createDecipheriv('aes-256-gcm', shared, sealed.subarray(32, 44))
decipher.setAuthTag(sealed.subarray(-16))
const opened = JSON.parse(Buffer.concat([decipher.update(sealed.subarray(44, -16)), decipher.final()]))
assert.deepEqual(opened, { env: [{ key: 'SECRET', value: 'of js' }] })
said('encryptEnvVars: both signatures by the identity key, round trip to the guest')

const tappd = new TappdClient()
assert.equal((await tappd.deriveKey('tls', 'js.example')).certificate_chain.length, 3)
assert.ok((await tappd.tdxQuote('data', 'keccak256')).quote.length > 1000)
assert.ok(await tappd.isReachable())
said('TappdClient: deriveKey, tdxQuote')

const begun = performance.now()
const answers = await Promise.all(Array.from({ length: CALLS }, (_, i) => (i % 2 ? client.getKey(`parallel/${i}`) : client.info())))
assert.equal(new Set(answers.filter((_, i) => i % 2).map((one) => hex(one.key))).size, CALLS / 2)
said(`${CALLS} calls at once in ${((performance.now() - begun) / 1000).toFixed(2)} s`)
